"""Tests of images in records: every form in which they come, what is refused, and that changed files are noticed."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as Pillow

from qlora_lite.data.images.image import Image, ImageStore, folder_of, image_of, is_image_part, taken_out, with_images
from qlora_lite.errors import CheckpointError

TEXT = {"type": "text", "text": "what?"}
PLACE = "data/a.jsonl, line 3"


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


def test_every_form_of_an_image_gives_its_bytes(tmp_path: Path) -> None:
    content = png()
    (tmp_path / "a b.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    forms: list[Any] = [
        "a b.png",
        str(tmp_path / "a b.png"),
        Path("a b.png"),
        (tmp_path / "a b.png").as_uri(),
        f"data:image/png;base64,{text}",
        content,
        {"bytes": content, "path": "lost.png"},
        {"bytes": None, "path": "a b.png"},
        {"base64": text},
    ]
    for value in forms:
        assert image_of(value, "it", tmp_path).read() == content
    assert image_of(text, "it", tmp_path, "base64").read() == content
    drawn = image_of(Pillow.open(io.BytesIO(content)), "it", tmp_path).read()
    assert Pillow.open(io.BytesIO(drawn)).getpixel((1, 1)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("https://host/a.png", r"it is a URL, and images are not fetched; save it and give its path: 'https://host/a"),
        ("data:image/png,abc", r"it must be a data: URL in base64, got 'data:"),
        ("data:image/png;base64,@", r"it is not base64: "),
        (5, r"it must be a path, bytes, or \{bytes, path\}, got int 5"),
        ({}, r"it must be a path, bytes, or \{bytes, path\}, got dict"),
        ("", r"it must be a path"),
    ],
)
def test_what_is_no_image_is_one_sentence(tmp_path: Path, value: Any, why: str) -> None:
    with pytest.raises(CheckpointError, match=why):
        image_of(value, "it", tmp_path)


def test_parts_and_columns_become_images_in_their_order() -> None:
    def messages(*parts: dict[str, object]) -> list[dict[str, object]]:
        return [{"role": "user", "content": [*parts, TEXT]}, {"role": "assistant", "content": "red"}]

    def contents(made: list[dict[str, object]]) -> list[bytes | None]:
        bare, images = taken_out(made)
        assert all(index == 0 for index, _ in images) and bare[1] == {"role": "assistant", "content": "red"}
        assert [part for part in bare[0]["content"] if is_image_part(part)] == [{"type": "image"}] * len(images)
        return [image.content for _, image in images]

    own = {"type": "image", "bytes": b"own"}
    assert contents(with_images(messages(own), {}, PLACE)) == [b"own"]
    assert contents(with_images(messages({"type": "image"}, own), {"images": [b"1"]}, PLACE)) == [b"1", b"own"]
    assert contents(with_images(messages({"type": "image"}), {"image": {"bytes": b"2"}}, PLACE)) == [b"2"]
    assert contents(with_images(messages(), {"images": [b"1", b"2"]}, PLACE)) == [b"1", b"2"]
    asked = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    assert contents(with_images(asked, {"images": [b"1"]}, PLACE)) == [b"1"]
    assert with_images(asked, {"images": []}, PLACE) == asked
    ((_, image),) = taken_out(with_images(messages({"type": "image", "path": "x.png"}), {}, PLACE))[1]
    assert image.path == Path("data/x.png") and folder_of("record 4") == Path()
    with pytest.raises(CheckpointError, match=r"line 3: messages\[0\]\.content\[0\] names no image; give it image or"):
        with_images(messages({"type": "image"}), {}, PLACE)
    with pytest.raises(CheckpointError, match="line 3: has 1 more in its images than parts for them"):
        with_images(messages({"type": "image"}), {"images": [b"1", b"2"]}, PLACE)
    with pytest.raises(CheckpointError, match="no user's message to put them into"):
        with_images([{"role": "assistant", "content": "red"}], {"images": [b"1"]}, PLACE)


def test_kept_images_are_read_again_and_changes_are_noticed(tmp_path: Path) -> None:
    store, path = ImageStore(), tmp_path / "a.png"
    path.write_bytes(png())
    file = store.keep(Image("a", path), path.read_bytes())
    one, other = (store.keep(Image("b", None, content), content) for content in (b"first", b"second"))
    assert file.path == path and file.read() == png() and one.path is None
    assert store.keep(Image("c", None, b"first"), b"first") is one  # kept once
    assert (other.read(), one.read()) == (b"second", b"first")
    path.write_bytes(png((0, 0, 255)))
    with pytest.raises(CheckpointError, match=r"a\.png has changed since its record was read; start again"):
        file.read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"a\.png does not exist"):
        file.read()
