"""Bad arguments of the command line: each option of each command empty, twice, without a value, with a wrong value,
or with a path that cannot be read or written. Part of endure.py; the tests use it too.

Commands and options come from the command line itself; an option that the tables below lack is an error. A command must
print one line to stderr and no traceback, end with status 2 for wrong usage and 1 for a failure, within a few seconds,
and leave every file and folder as it was.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer.main

from argument_values import NUMBERS, RIGHT, VALUES, WHOLE_NUMBERS
from bad_inputs import Wrong, limited, listing
from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, load_quantized, save_adapter, train
from qlora_lite.cli.main import app, main

USAGE, FAILURE = 2, 1
# Processor time; waiting for a pipe takes none, so it has a limit of its own.
SECONDS, HANGING_SECONDS = 4.0, 60.0

# The arguments that each command needs; {name} is a path of `CasePaths`.
# Tokens are not cached, so that nothing is written next to the data.
NEEDED = {
    "data": ["{data}", "--model", "{model}", "--no-token-cache"],
    "train": [
        *("--model", "{model}", "--data", "{data}", "--output", "{new}", "--rank", "2", "--steps", "1"),
        "--no-token-cache",
    ],
    "init": ["--yes", "--model", "{model}", "--data", "{data}", "--memory", "4GiB", "--output", "{new}"],
    "plan": ["--model", "{model}", "--memory", "1GiB"],
    "profile": ["--model", "{model}", "--rank", "2", "--rows", "1", "--tokens", "4", "--no-predict"],
    "chat": ["--model", "{model}"],
    "serve": ["--model", "{model}", "--port", "0"],
    "generate": ["--model", "{model}", "--prompts", "{data}", "--output", "{new}.jsonl", "--max-new-tokens", "1"],
    "inspect": ["{adapter}"],
    "merge": ["--model", "{model}", "--adapter", "{adapter}", "--output", "{new}"],
    "quantize": ["--model", "{model}", "--output", "{new}"],
    "push": ["{adapter}", "owner/name"],
    "report": ["{run}", "--output", "{new}.html"],
    "env": [],
}
IN_CONFIGURATION = "in configuration"
IN_FOLDER, IN_DATA, OUT_FOLDER, OUT_FILE, NOT_HERE = "in folder", "in data", "out folder", "out file", "not here"
PATHS = {
    **dict.fromkeys(("model", "adapter", "from_adapter", "folder", "runs"), IN_FOLDER),
    **dict.fromkeys(("data", "eval_data", "prompts", "sources", "verify", "calibrate"), IN_DATA),
    "configuration": IN_CONFIGURATION,
    "output": OUT_FOLDER,
    **dict.fromkeys(("generate output", "report output"), OUT_FILE),  # where one command means something else
    **dict.fromkeys(("html", "png", "file"), OUT_FILE),
    "snapshot": NOT_HERE,
}
# Of files; others have the suffix that is the option's name.
SUFFIXES = {"generate output": ".jsonl", "report output": ".html", "file": ".yaml"}
NOT_EMPTY, THERE = "not empty", "there"
NEWS = ("a\nb", "\u2028", "--no-such-option", "-z")


@dataclass(frozen=True)
class Case:
    command: str
    words: tuple[str, ...]
    status: int
    what: str


class CasePaths:
    """The paths that the cases use, below one folder: good inputs, and paths that cannot be read or written."""

    def __init__(self, root: Path, make_model: Callable[[Path], Path]) -> None:
        self.root = root
        self.paths = {"new": root / "new"}
        self.here = root / "here"
        self.here.mkdir(parents=True)
        self.paths["model"] = make_model(root / "model")
        self.paths["adapter"] = root / "adapter"
        model = load_quantized(self.paths["model"], QuantConfig())
        add_lora_(model, LoraConfig(2, target_modules=["q_proj"]))
        save_adapter(model, self.paths["adapter"])
        self.paths["data"] = root / "data.jsonl"
        self.paths["data"].write_text('{"text": "one"}\n{"text": "two"}\n')
        self.paths["run"] = root / "run"
        ids = torch.tensor([[1, 2, 3]])
        train(model, [{"input_ids": ids, "labels": ids}], TrainConfig(steps=1), output_dir=self.paths["run"])
        for suffix in ("", ".html", ".png", ".jsonl", ".yaml"):
            os.mkfifo(root / f"pipe{suffix}")
            (root / f"link{suffix}").symlink_to(root / "pipe")
            (root / f"circle{suffix}").symlink_to(root / f"circle{suffix}")
            (root / f"dangling{suffix}").symlink_to(root / "file" / f"dangling{suffix}")
            if suffix:
                (root / f"folder{suffix}").mkdir()
                (root / f"there{suffix}").touch()
        (root / "empty").mkdir()
        (root / "file").touch()
        self._strange_folder("unreadable", lambda path: path.symlink_to("/proc/self/mem"))
        self._strange_folder("pipes", os.mkfifo)
        self._strange_folder("folders", Path.mkdir)
        self.foreign = root / "foreign"
        self.foreign.mkdir()
        (self.foreign / "letter.txt").write_text("dear")

    def _strange_folder(self, name: str, make: Callable[[Path], Any]) -> None:
        (self.root / name).mkdir()
        for source in (self.paths["model"], self.paths["adapter"]):
            for path in source.iterdir():
                if not os.path.lexists(self.root / name / path.name):
                    make(self.root / name / path.name)

    def _nowhere(self, suffix: str = "") -> dict[str, Path]:
        return {
            "through a file": self.root / "file" / f"new{suffix}",
            "a circle of links": self.root / f"circle{suffix}",
            "a link to where nothing can be": self.root / f"dangling{suffix}",
            "too long a name": self.root / f"{'x' * 300}{suffix}",
            "too long a path": self.root / "/".join(["x" * 200] * 30) / f"new{suffix}",
            "a pipe": self.root / f"pipe{suffix}",
            "a link to a pipe": self.root / f"link{suffix}",
        }

    def bad(self, kind: str, option: str, command: str) -> dict[str, tuple[str, ...]]:
        """Returns the wrong values of a path option: {description: the words after the option's name}."""
        missing = {
            "missing": self.root / "missing",
            "not UTF-8": Path(os.fsdecode(os.fsencode(self.root) + b"/\xff\xfe")),
            "two lines": self.root / "a\nb",
        }
        if kind == IN_FOLDER:
            folders = {name: self.root / name for name in ("empty", "unreadable", "pipes", "folders")}
            found = {
                **missing,
                **self._nowhere(),
                **folders,
                "a file": self.root / "file",
                "a device": Path("/dev/zero"),
            }
        elif kind == IN_CONFIGURATION:
            others = {"records": self.paths["data"], "an empty folder": self.root / "empty", "a device": "/dev/zero"}
            found = {**missing, **self._nowhere(".yaml"), **others}
        elif kind == IN_DATA:
            files = {"an empty folder": self.root / "empty", "a device": Path("/dev/zero")}
            files["unreadable"] = Path("/proc/self/mem")
            found = {**missing, **self._nowhere(), **files, "an empty file": self.root / "there.jsonl"}
        elif kind == OUT_FOLDER:
            own = {"a file": self.root / "file", NOT_EMPTY: self.foreign}
            if command != "train":  # a run may share its folder with other files
                own |= {"above the inputs": self.root, "too long a temporary name": self.root / ("x" * 250)}
            for name in ("model", "adapter"):
                if f"{{{name}}}" in NEEDED[command]:
                    own |= {f"the {name}": self.paths[name], f"inside the {name}": self.paths[name] / "new"}
            found = {**self._nowhere(), **own}
        else:
            suffix = SUFFIXES.get(f"{command} {option}", SUFFIXES.get(option, f".{option}"))
            names = {"a folder": f"folder{suffix}", THERE: f"there{suffix}"}
            found = {**self._nowhere(suffix), **{what: self.root / name for what, name in names.items()}}
        return {what: (str(path),) for what, path in found.items()}


def _kind_of(hint: Any) -> Any:
    """Returns int, float, bool, str or Path for an annotation such as `list[int] | None`."""
    inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
    return _kind_of(inner[0]) if inner else hint


def parameters() -> dict[str, list[tuple[Any, Any]]]:
    """Returns {command: [(parameter of typer, its type)]} of the whole command line, without --help."""
    commands: Any = typer.main.get_command(app)
    found = {}
    for registered in app.registered_commands:
        function = registered.callback
        assert function is not None
        hints = typing.get_type_hints(function)
        params = commands.commands[function.__name__].params
        found[function.__name__] = [(param, _kind_of(hints[param.name])) for param in params if param.name in hints]
    return found


def _bad_values(
    paths: CasePaths, command: str, param: Any, kind: Any, overwrites: bool
) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yields (description, words after the option's name, status) for wrong values of one option.

    overwrites: whether the command has `--overwrite`.
    """
    name = param.name
    if kind is bool:
        return
    if name in PATHS:
        path_kind = PATHS.get(f"{command} {name}", PATHS[name])
        for what, words in paths.bad(path_kind, name, command).items() if path_kind != NOT_HERE else ():
            yield what, words, USAGE if path_kind == IN_CONFIGURATION else FAILURE
            # --overwrite may replace a file, and a run leaves foreign files where they are.
            may = what == THERE or (what == NOT_EMPTY and command == "train")
            if overwrites and path_kind in (OUT_FOLDER, OUT_FILE) and not may:
                yield f"{what}, --overwrite", (*words, "--overwrite"), FAILURE
        if path_kind in (OUT_FILE, NOT_HERE):
            yield "another suffix, or no device", (str(paths.root / "new.txt"),), USAGE
    elif kind in (int, float):
        for value in WHOLE_NUMBERS if kind is int else NUMBERS:
            if value not in RIGHT.get(name, ()):
                yield value, (value,), USAGE
    else:
        for value in VALUES[name]:
            yield value[:20], (value,), USAGE


def _of_one(
    paths: CasePaths, command: str, param: Any, kind: Any, overwrites: bool
) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Yields (description, words, status): an option with each wrong value, empty, twice, and without a value."""
    option = () if param.param_type_name == "argument" else (param.opts[0],)
    for what, words, status in _bad_values(paths, command, param, kind, overwrites):
        yield what, (*option, *words), status
    if kind is bool:
        yield "with a value", (f"{option[0]}=yes",), USAGE
        yield "twice", (option[0], option[0]), USAGE
        return
    if param.default != "":
        yield "empty", (*option, ""), USAGE
    if option:
        yield "without a value", option, USAGE
    if not param.multiple and param.nargs == 1:
        yield "twice", (*option, "7", *option, "7"), USAGE


def _around(needed: list[str], param: Any, options: list[tuple[Any, Any]]) -> tuple[list[str], list[str]]:
    """Returns the needed words before and after those of this option. Arguments are the first words, in their order."""
    if param.param_type_name == "argument":
        at = [other.name for other, _ in options if other.param_type_name == "argument"].index(param.name)
        return needed[:at], needed[at + param.required :]
    if param.opts[0] not in needed:
        return needed, []
    at = needed.index(param.opts[0])
    return needed[:at] + needed[at + (1 if param.is_flag else 2) :], []


def cases(paths: CasePaths) -> list[Case]:
    """Returns all cases. Raises KeyError for a command or an option that the tables lack."""
    found = []
    for command, options in parameters().items():
        needed = [word.format(**paths.paths) for word in NEEDED[command]]
        overwrites = any(param.name == "overwrite" for param, _ in options)
        for param, kind in options:
            rest, after = _around(needed, param, options)
            if param.required:
                found.append(Case(command, (*rest, *after), USAGE, f"{param.name}: missing"))
            for what, words, status in _of_one(paths, command, param, kind, overwrites):
                extra = ("--verify", str(paths.paths["data"])) if param.name == "verify_max_length" else ()
                if param.name == "require":
                    status = USAGE
                found.append(Case(command, (*rest, *extra, *words, *after), status, f"{param.name}: {what}"))
        takes_words = any(param.nargs == -1 for param, _ in options)
        for word in NEWS:
            status = FAILURE if takes_words and not word.startswith("-") else USAGE
            found.append(Case(command, (*needed, word), status, f"unknown word {word!r}"))
    return [*found, Case("destroy", (), USAGE, "no command"), Case("--x", (), USAGE, "no option")]


def run_main(words: tuple[str, ...] | list[str]) -> tuple[int, str]:
    """Runs the command line with these words in this process. Returns its exit status and its stderr."""
    before, errors, status = sys.argv, io.StringIO(), 0
    sys.argv = ["qlora-lite", *words]
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        sys.argv = before
    return status, errors.getvalue()


def _checked(paths: CasePaths, case: Case) -> None:
    before, began = listing(paths.root), time.process_time()
    with limited(HANGING_SECONDS):
        status, said = run_main([case.command, *case.words])
    taken = time.process_time() - began
    if len(said.splitlines()) != 1 or not said.startswith("error: ") or "Traceback" in said:
        raise Wrong(f"printed {said[-400:]!r} with status {status}")
    if status != case.status:
        raise Wrong(f"ended with status {status}, not {case.status}: {said}")
    if listing(paths.root) != before:
        raise Wrong("wrote something")
    if taken > SECONDS:
        raise Wrong(f"took {taken:.1f} s")


def run_argument_case(paths: CasePaths, case: Case) -> str | None:
    """Returns None if the case is handled correctly, else the problem."""
    shutil.rmtree(paths.paths["new"], ignore_errors=True)
    try:
        with contextlib.chdir(paths.here) if sys.version_info >= (3, 11) else contextlib.nullcontext():
            _checked(paths, case)
    except Exception as error:
        return f"{case.command}, {case.what}: {type(error).__name__}: {error}"
    return None


def bad_arguments(folder: Path, make_model: Callable[[Path], Path], every: int = 1) -> tuple[int, list[str]]:
    """Tries each `every`th case. Returns the number of cases tried, and the problems."""
    paths = CasePaths(folder, make_model)
    chosen = cases(paths)[::every]
    found = (run_argument_case(paths, case) for case in chosen)
    return len(chosen), [problem for problem in found if problem is not None]
