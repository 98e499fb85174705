"""`qlora-lite push`: uploads an adapter or a checkpoint to a repository of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_lite.cli.options import Json, finish


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a merged or packed checkpoint.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; it is made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; it is made if it does not exist. Default: main.")
    ] = None,
    json: Json = False,
) -> None:
    """Upload an adapter, or a merged or packed checkpoint, to the hub: its own files and nothing else."""
    from dataclasses import asdict

    from qlora_lite.errors import listing
    from qlora_lite.export.publishing.published_files import published_files
    from qlora_lite.export.publishing.push import check_names, push_to_hub
    from qlora_lite.memory.report import readable_bytes

    check_names(repository, revision)
    upload = published_files(folder)
    width = max(map(len, upload.files))
    print(f"{folder}: {upload.kind}, {len(upload.files)} files")
    for name in upload.files:
        note = "  (without the path of the base on this machine)" if name in upload.replaced else ""
        print(f"  {name:<{width}}  {readable_bytes(upload.size(name)):>11}{note}")
    if upload.left:
        print(f"not uploaded: {listing(upload.left)}")
    done = push_to_hub(folder, repository, private=private, revision=revision)
    for names, what in (
        (done.kept, "edited there, and kept"),
        (done.removed, "of an earlier upload, and removed there"),
    ):
        if names:
            print(f"{what}: {listing(names)}")
    figures = asdict(done)
    finish(figures if json else {key: figures[key] for key in ("repository", "address", "revision", "commit")}, json)
