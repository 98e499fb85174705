"""Does the package's work with all that Linux has, or with what only Linux has taken away. A simulation, on Linux.

`python tests/simulated_windows.py CHECKPOINT DATA [--simulated]` works in the current folder and prints one JSON line,
which should not depend on the last option. It needs its own process, whose `os` it changes.

Taken away are modules, functions, flags and /proc. What differs on Windows refuses as it does there: a folder is not
opened, an open or mapped file is neither removed nor replaced nor renamed, alone or with a folder above it, a file
opened for reading is not flushed, and a name has no colon. What Windows adds (drives, long paths, scanners, access
lists, its own lock) is not simulated.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import importlib
import json
import os
import pkgutil
import shutil
import signal
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

MODULES = {"fcntl", "resource", "termios", "pwd", "grp"}
NAMES = (
    *("preadv", "pread", "pwritev", "pwrite", "posix_fadvise", "posix_fallocate", "sched_getaffinity", "getuid"),
    *("fchmod", "sysconf", "O_DIRECT", "O_DIRECTORY"),
)
# They ask for other things on Windows, so they are imported before anything is taken away.
LIBRARIES = ("filelock", "psutil", "torch._dynamo", "transformers", "accelerate", "bitsandbytes", "huggingface_hub")
HIDDEN = "/proc/self/"
ACCESS_DENIED, SHARING_VIOLATION = 5, 32
FORBIDDEN = set(':?*"<>|\\')
STEPS, STOPPED_AFTER = 4, 2


def refused(winerror: int, path: object) -> PermissionError:
    """The error of Windows, with the number that it has there."""
    error = PermissionError(errno.EACCES, "Access is denied", os.fsdecode(path))  # type: ignore[arg-type]
    error.winerror = winerror  # type: ignore[attr-defined]
    return error


def take_modules_away() -> None:
    """The package cannot import them. Other libraries have a way of their own on Windows, and keep them here."""
    real = builtins.__import__

    def imported(name: str, within: Any = None, *rest: Any, **named: Any) -> Any:
        if name in MODULES and within is not None and str(within.get("__name__")).split(".")[0] == "qlora_lite":
            raise ImportError(f"{name} is taken away")
        return real(name, within, *rest, **named)

    builtins.__import__ = imported


def take_names_away() -> None:
    for name in NAMES:
        delattr(os, name)
    library = ctypes.CDLL

    class NamedLibrary(library):  # type: ignore[valid-type,misc]
        def __init__(self, name: str | None, *given: Any, **named: Any) -> None:
            if name is None:
                raise TypeError("argument of type 'NoneType' is not iterable")
            super().__init__(name, *given, **named)

    ctypes.CDLL = NamedLibrary  # type: ignore[misc]


_open = builtins.open
_real = {name: getattr(os, name) for name in ("open", "fsync", "access", "unlink", "replace")}


def is_in_use(path: object) -> bool:
    """Whether this process has a file open or mapped, or one below a folder."""
    place = os.path.realpath(os.fsdecode(path))  # type: ignore[arg-type]
    with _open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        found = {"/" + line.rstrip("\n").partition("/")[2] for line in maps}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of listdir itself
            found.add(os.readlink(f"/proc/self/fd/{number}"))
    return any(name == place or name.startswith(f"{place}/") for name in found)


def check_visible(path: object) -> None:
    if str(path).startswith(HIDDEN):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))


def refuse_to_open() -> None:
    """Hides /proc/self. Opens no folder, flushes nothing opened for reading, makes no name that Windows forbids."""

    def opened(path: Any, *given: Any, **named: Any) -> int:
        check_visible(path)
        if not isinstance(path, int) and os.path.isdir(path):
            raise refused(ACCESS_DENIED, path)
        return _real["open"](path, *given, **named)

    def open_file(file: Any, *given: Any, **named: Any) -> Any:
        check_visible(file)
        return _open(file, *given, **named)

    def synced(descriptor: int) -> None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        _real["fsync"](descriptor)

    def accessible(path: Any, *given: Any, **named: Any) -> bool:
        return not str(path).startswith(HIDDEN) and _real["access"](path, *given, **named)

    below = os.path.dirname(os.getcwd())

    def checked(event: str, given: tuple[Any, ...]) -> None:
        is_ours = event in ("open", "os.mkdir") and isinstance(given[0], str) and given[0].startswith(below)
        if is_ours and set(given[0]) & FORBIDDEN:
            raise OSError(errno.EINVAL, "Invalid argument", given[0])

    builtins.open = open_file
    os.open, os.fsync, os.access = opened, synced, accessible  # type: ignore[assignment]
    sys.addaudithook(checked)


def refuse_to_change() -> None:
    """Removes, replaces and renames nothing that is in use."""
    shutil._use_fd_functions = False  # type: ignore[attr-defined]

    def unlinked(path: Any, **named: Any) -> None:
        if is_in_use(path):
            raise refused(SHARING_VIOLATION, path)
        _real["unlink"](path, **named)

    def renamed(source: Any, target: Any, **named: Any) -> None:
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "File exists", target)
        replaced(source, target, **named)

    def replaced(source: Any, target: Any, **named: Any) -> None:
        if os.path.isdir(target) or is_in_use(source) or is_in_use(target):
            raise refused(ACCESS_DENIED, target)
        _real["replace"](source, target, **named)

    os.unlink = os.remove = unlinked
    os.rename, os.replace = renamed, replaced


def simulate() -> None:
    """Takes it all away, and makes sure that it is gone."""
    for library in LIBRARIES:
        importlib.import_module(library)
    take_modules_away()
    take_names_away()
    refuse_to_open()
    refuse_to_change()
    try:
        exec("import fcntl", {"__name__": "qlora_lite.test"})
    except ImportError:
        return
    raise AssertionError("fcntl is still there")


def import_all() -> int:
    """Imports every file of the package. Returns their number."""
    import qlora_lite

    found = list(pkgutil.walk_packages(qlora_lite.__path__, "qlora_lite."))
    for module in found:
        importlib.import_module(module.name)
    return len(found)


def digests(folder: Path, left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """The SHA-256 of each file of a folder; hidden ones are not left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in left_out)
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in paths}


def tokens(data: Path, tokenizer: Any) -> tuple[dict[str, object], bool]:
    """Reads a folder's split with a cache: made, read again, replaced while it is in use, and too old while in use.

    Returns the tokens, and whether those in use are still on disk.
    """
    from qlora_lite.data import DataConfig, token_cache, tokenization, tokenize_sources
    from qlora_lite.data.sources.source import Source

    split = f"{data.parent}:train"
    made, read = (tokenize_sources([split], tokenizer) for _ in range(2))
    (folder,) = token_cache.cache_folder(Source(split)).iterdir()
    load_tokens = tokenization.load_tokens
    tokenization.load_tokens = lambda folder: None  # as if another run was about to write them
    replaced = tokenize_sources([split], tokenizer)
    tokenization.load_tokens = load_tokens
    for limit in range(1, token_cache.KEPT_FOLDERS + 2):
        tokenize_sources([split], tokenizer, DataConfig(limit=limit))
    examples = [[example.input_ids for example in found.examples] for found in (made, read, replaced)]
    assert [found.parts[0].was_cached for found in (made, read, replaced)] == [False, True, False]
    return {"examples": examples}, load_tokens(folder) is not None


def adapted(checkpoint: Path) -> Any:
    import torch

    from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized

    model = load_quantized(checkpoint, QuantConfig())
    torch.manual_seed(0)
    add_lora_(model, LoraConfig(rank=2, alpha=4))
    return model


def trained(checkpoint: Path, examples: Any) -> Any:
    """Trains, is stopped by a signal, and resumes. Returns the model."""
    from qlora_lite import TrainConfig, train
    from qlora_lite.data import batches
    from qlora_lite.errors import Stopped
    from qlora_lite.training.run_folder import RunFolder

    config = TrainConfig(steps=STEPS, save_steps=1, keep_last=1)
    finish_step = RunFolder.finish_step

    def stopped(writer: RunFolder, metrics: Any) -> None:
        finish_step(writer, metrics)
        if metrics.step == STOPPED_AFTER:
            signal.raise_signal(signal.SIGTERM)

    RunFolder.finish_step = stopped  # type: ignore[method-assign]
    try:
        train(adapted(checkpoint), batches(examples, 2, 0, pad_token_id=1), config, output_dir="run", progress=False)
        raise AssertionError("the run was not stopped")
    except Stopped:
        RunFolder.finish_step = finish_step  # type: ignore[method-assign]
    model = adapted(checkpoint)
    data = batches(examples, 2, 0, pad_token_id=1)
    result = train(model, data, config, output_dir="run", resume=True, progress=False)
    assert result.resumed_from is not None and len(result.losses) == STEPS
    return model


def exported(checkpoint: Path, model: Any) -> None:
    """Writes each kind of export, one over another, and asks for a lock twice."""
    from qlora_lite import QuantConfig, export_merged
    from qlora_lite.errors import CheckpointError
    from qlora_lite.export.merged import merge_checkpoint
    from qlora_lite.export.quantized import save_quantized
    from qlora_lite.lora.adapters import remove_lora_
    from qlora_lite.system import locked_folder

    for _ in range(2):
        export_merged(model, "merged", overwrite=True)
    merge_checkpoint(checkpoint, "run/adapter", "from-disk", QuantConfig())
    remove_lora_(model)
    save_quantized(model, "packed")
    said = ""
    with locked_folder(Path("run")):
        try:
            with locked_folder(Path("run")):
                pass
        except CheckpointError as error:
            said = str(error)
    assert f"another run (process {os.getpid()})" in said


def main() -> None:
    checkpoint, data = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:] == ["--simulated"]:
        simulate()
    files = import_all()
    from qlora_lite.checkpoints import load_tokenizer
    from qlora_lite.data import tokenize_sources
    from qlora_lite.memory.counters import peak_bytes, resident_bytes
    from qlora_lite.system import missing

    found, are_kept = tokens(data, load_tokenizer(checkpoint))
    model = trained(checkpoint, tokenize_sources([data], load_tokenizer(checkpoint)).examples)
    exported(checkpoint, model)
    assert resident_bytes() is not None
    lacking = {"missing": missing(), "peak": peak_bytes(model.device) is not None, "tokens kept": are_kept}
    written = {name: digests(Path(name)) for name in ("run/adapter", "merged", "from-disk", "packed")}
    names = sorted(path.as_posix() for path in Path().rglob("*"))
    same = {"files": files, **found, "written": written, "names": names}
    sys.stdout.write(json.dumps({"lacking": lacking, "same": same}) + "\n")


if __name__ == "__main__":
    main()
