"""`push_to_hub`: uploads an adapter or a checkpoint to a repository of the hub, in one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.files import excerpt
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import ROWS_FILE
from qlora_lite.checkpoints.repository.client_errors import LOG_IN, hub_errors
from qlora_lite.checkpoints.repository.download import CARD_FILE, is_repository_name
from qlora_lite.checkpoints.repository.model_card import is_own
from qlora_lite.checkpoints.safetensors_write import INDEX_FILE
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.publishing.published_files import (
    ADAPTER,
    CHECKPOINT,
    PublishedFiles,
    published_files,
)
from qlora_lite.lora.peft.options import CONFIG_FILE as ADAPTER_CONFIG_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
# Names that git takes for a branch: of no more than 200 characters, without two dots, and not ending in .lock.
BRANCH = re.compile(r"(?!.*\.\.)(?!.*\.lock\Z)(?=.{1,200}\Z)[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)*", re.ASCII)
# The tensor files that readers of a checkpoint look for.
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Pushed:
    """A finished upload.

    kind: adapter or checkpoint. address: of the repository. revision: the branch. commit: its new commit. files: what
    went up. left: what stayed. kept: files of the repository that its owner edited there, and that were not replaced.
    removed: weights of an earlier upload that readers would take for the new ones.
    """

    kind: str
    repository: str
    address: str
    revision: str
    commit: str
    files: tuple[str, ...]
    bytes: int
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def push_to_hub(
    folder: str | Path, repo_id: str, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> Pushed:
    """Uploads the folder of an adapter, or of a merged or packed checkpoint, to a repository of the hub.

    Only files that such a folder is known to have go up, in one commit; optimizer states, caches and locks stay
    (published_files.py). The repository is made if it does not exist. A model card that was edited there is kept, and
    weights of an earlier upload that readers would take for the new ones are removed.

    repo_id: `owner/name`, or `name` for a repository of your own. private: the repository is made private; one that
    exists and is public is refused. revision: the branch, which is made if it does not exist; None for `main`. token:
    None takes HF_TOKEN, or the one of `hf auth login`.

    Raises ConfigError for names that no repository or branch can have; CheckpointError, in one sentence, for a folder
    that cannot be uploaded, if the hub refuses it, or if it cannot be reached.
    """
    check_names(repo_id, revision)
    upload = published_files(Path(folder))
    with hub_errors(f"{folder} cannot be pushed to {repo_id}"):
        return _push(upload, repo_id, private, revision or MAIN, token)


def check_names(repo_id: str, revision: str | None) -> None:
    """Raises ConfigError for names that no repository of the hub, or no branch, can have."""
    if not is_repository_name(repo_id):
        raise ConfigError(
            f"the repository must be owner/name, of letters, digits, '-', '_' and '.'; got {excerpt(repo_id)}"
        )
    if revision is not None and not BRANCH.fullmatch(revision):
        raise ConfigError(f"the revision must be the name of a branch; got {excerpt(revision)}")


def _push(upload: PublishedFiles, repo_id: str, private: bool, revision: str, token: str | None) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if token is None and get_token() is None:
        raise CheckpointError(f"{upload.folder} cannot be pushed to {repo_id}: there is no token; {LOG_IN}")
    api = HfApi(token=token)
    made = api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.model_info(made.repo_id).private:
        raise CheckpointError(
            f"{made.repo_id} exists and is public, and private (--private) was asked for; name another repository, or "
            f"make that one private on its page"
        )
    if revision != MAIN:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(made.repo_id, revision=revision)
    _check_same_kind(upload, made.repo_id, there)
    kept = [CARD_FILE] if _is_edited(api, made.repo_id, revision, there, upload) else []
    names = [name for name in upload.files if name not in kept]
    contents = {name: upload.replaced.get(name, upload.files[name]) for name in names}
    removed = _stale_weights(there, upload)
    operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
    operations += [CommitOperationDelete(name) for name in removed]
    message = f"Upload {'an adapter' if upload.kind == ADAPTER else 'a checkpoint'} with qlora_lite"
    commit = api.create_commit(made.repo_id, operations, commit_message=message, revision=revision)
    return Pushed(
        upload.kind,
        made.repo_id,
        str(made),
        revision,
        str(commit.oid),
        tuple(names),
        sum(map(upload.size, names)),
        upload.left,
        tuple(kept),
        tuple(removed),
    )


def _check_same_kind(upload: PublishedFiles, repo_id: str, there: list[str]) -> None:
    """Raises CheckpointError if the repository holds an adapter and a checkpoint would be put beside it, or so."""
    other = {ADAPTER: hub.CONFIG_FILE, CHECKPOINT: ADAPTER_CONFIG_FILE}[upload.kind]
    if other in there:
        held = "a checkpoint" if upload.kind == ADAPTER else "an adapter"
        raise CheckpointError(
            f"{repo_id} holds {held}, and readers would take one for the other; name another repository"
        )


def _is_edited(api: HfApi, repo_id: str, revision: str, there: list[str], upload: PublishedFiles) -> bool:
    """Whether our model card would replace one that the owner of the repository wrote or edited."""
    if CARD_FILE not in there or CARD_FILE not in upload.files:
        return False
    if not is_own(upload.files[CARD_FILE]):
        return False  # the user's own text goes up
    return not is_own(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=revision)))


def _stale_weights(there: list[str], upload: PublishedFiles) -> list[str]:
    """Returns the files of a checkpoint's weights in the repository that the upload does not replace."""
    found = [name for name in there if WEIGHTS.fullmatch(name) or name in (INDEX_FILE, ROWS_FILE)]
    return sorted(set(found) - upload.files.keys())
