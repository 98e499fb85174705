"""Which revision of a repository is used, so that one piece of work reads all files of one and asks the hub once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Revision:
    """A revision of a repository. folder: in the cache, with its small files. names: of all its files.

    names are None if the hub did not answer, and the newest revision in the cache is used.
    """

    folder: Path
    names: Sequence[str] | None


_used: dict[str, Revision] | None = None  # outside of `hub_asked_once`


@contextmanager
def hub_asked_once() -> Iterator[None]:
    """Within the block the hub is asked once for the newest revision of each checkpoint, and that one is used.

    So a command reads config, tokenizer and weights of one revision, and waits for the hub once.
    """
    global _used
    before, _used = _used, {}
    try:
        yield
    finally:
        _used = before


def revision_in_use(repo_id: str) -> Revision | None:
    """Returns the revision of a repository that was used before in the block; None if there is none."""
    return None if _used is None else _used.get(repo_id)


def use_revision(repo_id: str, revision: Revision) -> None:
    """Makes this the revision of a repository until the end of the block; does nothing outside of one."""
    if _used is not None:
        _used[repo_id] = revision
