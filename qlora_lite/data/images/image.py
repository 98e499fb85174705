"""Images of a record: found in its messages and columns, kept as a path or in a file of bytes, and read when needed.

A part of a message is `{"type": "image", KEY: ...}`, where KEY is `image`, `path`, `url`, `base64` or `bytes`. A part
without a key takes the next image of the record's column `images` or `image`, and if no message has such a part,
the column's images stand before the text of the first user's message, as trl has them.

An image is a path (relative ones from the folder of the record's file), a `file:` or `data:` URL, bytes, an object of
pillow, or `{"bytes": ..., "path": ...}` as parquet files of `datasets` have it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

from qlora_lite.checkpoints.files import excerpt, open_regular, reason
from qlora_lite.errors import CheckpointError

IMAGE = "image"
SOURCES = (IMAGE, "path", "url", "base64", "bytes")
COLUMNS = ("images", IMAGE)
LARGEST_FILE = 256 << 20


@dataclass(frozen=True)
class Image:
    """An image as it lies on disk or in a record, not decoded. name: for errors. One of path and content is given."""

    name: str
    path: Path | None = None
    content: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """Returns the bytes of the image's file. Raises CheckpointError if it cannot be read."""
        if self.path is None:
            assert self.content is not None
            return self.content
        try:
            with open_regular(self.path, "an image", LARGEST_FILE) as file:
                return file.read()
        except OSError as error:
            raise CheckpointError(f"the image {self.path} cannot be read: {reason(error)}") from error


@dataclass(frozen=True)
class KeptImage:
    """An image of an example, by which its bytes are read again. digest: SHA-256 of them. path: None if they are kept
    in `store`, at `start`."""

    name: str
    digest: bytes
    path: Path | None
    store: IO[bytes] | None = None
    start: int = 0
    length: int = 0

    def read(self) -> bytes:
        """Returns the bytes. Raises CheckpointError if the file was changed or removed since it was first read."""
        if self.store is not None:
            self.store.seek(self.start)
            return self.store.read(self.length)
        content = Image(self.name, self.path).read()
        if hashlib.sha256(content).digest() != self.digest:
            raise CheckpointError(f"the image {self.path} has changed since its record was read; start again")
        return content


class ImageStore:
    """Keeps the images of examples: the paths of files, and other bytes once each in a temporary file."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._kept: dict[bytes, KeptImage] = {}

    def keep(self, image: Image, content: bytes) -> KeptImage:
        """Returns what reads an image again. content: its bytes."""
        digest = hashlib.sha256(content).digest()
        if image.path is not None:
            return KeptImage(image.name, digest, image.path.absolute())
        if digest not in self._kept:
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115 - removed with the last reference
            start = self._file.seek(0, io.SEEK_END)
            self._file.write(content)
            self._kept[digest] = KeptImage(image.name, digest, None, self._file, start, len(content))
        return self._kept[digest]


def _of_url(url: str, name: str, folder: Path) -> Image:
    """An image of a `data:` or `file:` URL, or of a path. Raises CheckpointError for other URLs."""
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        head, comma, text = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise CheckpointError(f"{name} must be a data: URL in base64, got {excerpt(url)}")
        return _of_base64(text, name)
    if scheme == "file":
        return Image(name, Path(url2pathname(unquote(urlparse(url).path))))
    if "://" in url:
        raise CheckpointError(f"{name} is a URL, and images are not fetched; save it and give its path: {excerpt(url)}")
    return Image(name, folder / Path(url).expanduser())


def _of_base64(text: str, name: str) -> Image:
    try:
        return Image(name, None, base64.b64decode("".join(text.split()), validate=True))
    except (binascii.Error, ValueError) as error:
        raise CheckpointError(f"{name} is not base64: {error}; got {excerpt(text)}") from error


def image_of(value: Any, name: str, folder: Path, key: str = IMAGE) -> Image:
    """Returns the image that a value of a record means. Raises CheckpointError, beginning with `name`, if none.

    key: under which the value stands. folder: of the record's file.
    """
    if isinstance(value, (bytes, bytearray)):
        return Image(name, None, bytes(value))
    if isinstance(value, str) and value:
        return _of_base64(value, name) if key in ("base64", "bytes") else _of_url(value, name, folder)
    if isinstance(value, Path):
        return Image(name, folder / value)
    if isinstance(value, Mapping):
        for inner in ("bytes", "base64", "path", "url"):
            if value.get(inner) is not None:
                return image_of(value[inner], name, folder, inner)
    elif hasattr(value, "save") and hasattr(value, "convert"):
        content = io.BytesIO()
        value.save(content, "PNG")
        return Image(name, None, content.getvalue())
    raise CheckpointError(
        f"{name} must be a path, bytes, or {{bytes, path}}, got {type(value).__name__} {excerpt(value)}"
    )


def is_image_part(part: object) -> bool:
    """Whether a part of a message is an image."""
    return isinstance(part, Mapping) and part.get("type") == IMAGE


def folder_of(place: str) -> Path:
    """Returns the folder of the file that a record's place begins with, as of "data/chats.jsonl, line 3"."""
    return Path(place.rpartition(", ")[0]).parent


def with_images(
    messages: Sequence[Mapping[str, object]], record: Mapping[str, object], place: str
) -> list[dict[str, object]]:
    """Returns checked messages whose image parts hold an `Image`, those of the record's columns included.

    Raises CheckpointError, beginning with `place`, for parts that name no image, and for too few or too many in the
    column.
    """
    column = _column(record, place)
    made = [dict(message) for message in messages]
    parts = [(i, n, part) for i, m in enumerate(made) for n, part in enumerate(_parts(m)) if is_image_part(part)]
    if not parts and not column:
        return made
    if not parts:
        return _before_the_first_question(made, column, place)
    waiting = iter(column)
    for index, number, part in parts:
        name = f"{place}: messages[{index}].content[{number}]"
        key = next((key for key in SOURCES if part.get(key) is not None), None)
        image = next(waiting, None) if key is None else image_of(part[key], name, folder_of(place), key)
        if image is None:
            raise CheckpointError(f"{name} names no image; give it {' or '.join(SOURCES[:2])}, or the record `images`")
        content = list(_parts(made[index]))
        content[number] = {"type": IMAGE, IMAGE: image}
        made[index]["content"] = content
    if left := len(list(waiting)):
        raise CheckpointError(f"{place}: has {left} more in its images than parts for them in the messages")
    return made


def _parts(message: Mapping[str, object]) -> Sequence[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else ()


def _column(record: Mapping[str, object], place: str) -> list[Image]:
    found: list[Image] = []
    for key in COLUMNS:
        value = record.get(key)
        if value is None or value == []:
            continue
        values = value if isinstance(value, list) else [value]
        found += [image_of(one, f"{place}: {key}[{n}]", folder_of(place)) for n, one in enumerate(values)]
    return found


def _before_the_first_question(
    messages: list[dict[str, object]], images: Sequence[Image], place: str
) -> list[dict[str, object]]:
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            text = content if isinstance(content, list) else [{"type": "text", "text": content}]
            message["content"] = [*({"type": IMAGE, IMAGE: image} for image in images), *text]
            return messages
    raise CheckpointError(f"{place}: has images, and no user's message to put them into; name them in the messages")


def taken_out(messages: Sequence[Mapping[str, object]]) -> tuple[list[dict[str, object]], list[tuple[int, Image]]]:
    """Returns the messages as a chat template gets them, and their images, each with the index of its message."""
    images: list[tuple[int, Image]] = []
    bare = []
    for index, message in enumerate(messages):
        parts = _parts(message)
        images += [(index, part[IMAGE]) for part in parts if is_image_part(part)]
        content = [{"type": IMAGE} if is_image_part(part) else part for part in parts]
        bare.append({**message, "content": content} if parts else dict(message))
    return bare, images
