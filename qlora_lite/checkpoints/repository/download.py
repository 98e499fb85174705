"""Fetches a checkpoint of the hub: the safetensors files that a model is read from, and the small files beside them.

Repositories hold the same weights several times: as `consolidated.safetensors` or in `original/` for other programs, as
pickles, GGUF or ONNX. Only the files that the index names are fetched (or the one file, where there is no index). They
lie in the cache of huggingface_hub, which fetches a file once, continues one whose connection broke, and keeps those
that are complete when a download ends early.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_lite.checkpoints.files import CONFIG_FILE, did_you_mean, has_config, is_companion_name, read_json
from qlora_lite.checkpoints.repository.client_errors import hub_errors
from qlora_lite.checkpoints.repository.revisions import Revision, revision_in_use, use_revision
from qlora_lite.checkpoints.safetensors_read import PICKLES, conversion_remedy
from qlora_lite.checkpoints.safetensors_write import INDEX_FILE, SINGLE_FILE
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.signals import obeyed_at_once

CARD_FILE = "README.md"
ADAPTER_CONFIG_FILE = "adapter_config.json"
INDEX_SUFFIX = ".index.json"
# Files of a folder below the checkpoint's: chat templates, and statistics of rows that save_quantized writes.
FILES_BELOW = ("additional_chat_templates/*.jinja", "int8_rows/absmax.safetensors")
# A folder in the cache of huggingface_hub.
CACHED = re.compile(r"/models--([^/]+)/snapshots/[^/]+/?\Z")
# Names of repositories, with and without an owner, as the client of the hub takes them.
REPOSITORY_NAME = re.compile(
    r"(?!.*(?:--|\.\.))(?!.*\.git\Z)(?=.{1,96}\Z)(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII
)
# Weights in forms that are not read.
OTHER_WEIGHTS = (*PICKLES, ".gguf", ".onnx", ".h5", ".msgpack")


def _small_files(names: Iterable[str]) -> list[str]:
    """Returns the files of a repository besides weights that loading or exporting a checkpoint may need."""
    below = [Path(pattern) for pattern in FILES_BELOW]
    return [
        name
        for name in names
        if name == CARD_FILE  # says the licence
        or (is_companion_name(name) and "/" not in name and (name == INDEX_FILE or not name.endswith(INDEX_SUFFIX)))
        or any(Path(name).match(str(pattern)) and name.count("/") == 1 for pattern in below)
    ]


def _weight_files(folder: Path) -> list[str]:
    """Returns the files of weights that a folder needs, whether or not it has them: one, or those of its index."""
    if not (folder / INDEX_FILE).is_file():
        return [SINGLE_FILE]
    named = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map")
    files = sorted(set(map(str, named.values())))
    if foreign := [name for name in files if not name.endswith(".safetensors")]:
        raise CheckpointError(f"{folder / INDEX_FILE} names {listing(foreign, 4)}, which are not safetensors files")
    return files


def _missing_weights(folder: Path) -> list[str]:
    if (folder / SINGLE_FILE).is_file():
        return []
    return [name for name in _weight_files(folder) if not (folder / name).is_file()]


def _check_readable(repo_id: str, names: Sequence[str]) -> None:
    """Raises CheckpointError for a repository without a config or without weights that can be read."""
    if CONFIG_FILE not in names:
        adapter = ADAPTER_CONFIG_FILE in names
        hint = "it is an adapter: name its base, and the adapter apart from it" if adapter else "name another one"
        raise CheckpointError(f"{repo_id} has no {CONFIG_FILE}; {hint}")
    if SINGLE_FILE in names or INDEX_FILE in names:
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    others = [name for name in names if name.endswith((*OTHER_WEIGHTS, ".safetensors"))]
    found = f"; it has {listing(others, 4)}" if others else ""
    remedy = f": {conversion_remedy(repo_id)}" if pickles else ""
    raise CheckpointError(f"{repo_id} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}{remedy}")


def _fetch(repo_id: str, revision: str | None, names: Sequence[str], commit: str | None) -> Path:
    """Fetches those of these files that the cache lacks; returns the folder of the revision in the cache.

    commit: of that revision. Files that are all in the cache are not asked for, and no progress is shown.
    """
    from huggingface_hub import snapshot_download

    held = cached_checkpoint(repo_id, commit)
    if held is not None and all((held / name).is_file() for name in names):
        return held
    exactly = [glob.escape(name) for name in names]
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=exactly))


def _fetch_weights(repo_id: str, revision: Revision) -> None:
    """Fetches the weights that the cache lacks."""
    if revision.names is None:
        return
    needed = [SINGLE_FILE] if SINGLE_FILE in revision.names else _weight_files(revision.folder)
    if absent := [name for name in needed if name not in revision.names]:
        raise CheckpointError(f"the index of {repo_id} names files that the repository lacks: {listing(absent, 4)}")
    _fetch(repo_id, revision.folder.name, needed, revision.folder.name)


def _newest_revision(repo_id: str) -> Revision:
    from huggingface_hub import HfApi

    found = HfApi().model_info(repo_id)
    names = [file.rfilename for file in found.siblings or ()]
    _check_readable(repo_id, names)
    return Revision(_fetch(repo_id, None, _small_files(names), found.sha), names)


def download_checkpoint(repo_id: str, weights: bool = True) -> Path:
    """Returns the folder of a checkpoint of the hub in the local cache, after fetching what the cache lacks.

    weights: False fetches config, tokenizer and the like alone. If the hub cannot be asked, or refuses to answer, the
    newest revision in the cache is used if it is complete.

    Raises CheckpointError, in one sentence, if there is no such repository, it cannot be reached or holds no weights
    that can be read.
    """
    near = did_you_mean(repo_id, has_config).lstrip("; ")
    what = f"{repo_id} is not a local folder{f' ({near})' if near else ''}"
    with obeyed_at_once(), hub_errors(f"{what} and cannot be fetched"):
        try:
            revision = revision_in_use(repo_id) or _newest_revision(repo_id)
            if weights:
                _fetch_weights(repo_id, revision)
        except CheckpointError:
            raise
        except Exception:
            held = cached_checkpoint(repo_id)
            if held is None or (weights and _missing_weights(held)):
                raise
            revision = Revision(held, None)
    use_revision(repo_id, revision)
    return revision.folder


def cached_checkpoint(repo_id: str, revision: str | None = None) -> Path | None:
    """Returns the folder of a checkpoint in the local cache, None if it has none there. Nothing is fetched."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision)
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(config).parent if isinstance(config, str) else None


def hub_id(folder: Path) -> str | None:
    """Returns the id of the repository that a folder of the local cache was fetched from, None for another folder."""
    found = CACHED.search(folder.absolute().as_posix())
    return None if found is None else found[1].replace("--", "/")


def is_repository_name(name: str) -> bool:
    """Whether a repository of the hub may have this name: `owner/name`, or `name` alone."""
    return REPOSITORY_NAME.fullmatch(name) is not None
