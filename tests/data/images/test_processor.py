"""Tests of images as tokens and arrays, against transformers' own processing of whole conversations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow

from qlora_lite.checkpoints.hub import load_processor, load_tokenizer
from qlora_lite.data import batches, tokenize_all, tokenize_sources
from qlora_lite.data.images.processor import ImageProcessor, spans_around
from qlora_lite.errors import CheckpointError, ConfigError

SIZES = ((30, 30), (60, 30))


def record(*images: str, question: str = "?") -> dict[str, Any]:
    parts = [{"type": "image", "path": image} for image in images]
    content = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]}


class ReadLater(list[Any]):
    """Examples of known lengths, which are read with their batch alone."""

    lengths: Any


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two pictures, and records with none, one and both of them."""
    monkeypatch.chdir(tmp_path)
    for number, size in enumerate(SIZES):
        Pillow.new("RGB", size, (200, 40 * number, 0)).save(tmp_path / f"{number}.png")
    lines = [record("0.png"), record(), record("0.png", "1.png")]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl", "llava", "smolvlm"])
def test_tokens_and_arrays_are_those_of_transformers(
    make_tiny_vision_model: Callable[..., Path], pictures: Path, family: str
) -> None:
    folder = make_tiny_vision_model(pictures / "model", family)
    tokenizer, images, own = load_tokenizer(folder), ImageProcessor(folder), load_processor(folder)
    made = tokenize_sources([pictures / "records.jsonl"], tokenizer, images=images)
    assert not (pictures / ".records.jsonl.tokens").exists()  # the files of images may change
    examples = made.examples
    assert [len(example.images) for example in examples] == [1, 0, 2] and examples.has_images
    (batch,) = batches(examples, 3, 0, pad_token_id=0, epochs=1, images=images)
    assert sorted(batch["images.rows"].tolist()) == [0, 1, 2]
    order = [batch["images.rows"].tolist().index(count) for count in (1, 0, 2)]
    opened = [Pillow.open(pictures / f"{number}.png") for number in (0, 1)]
    for example, row, count in zip(examples, order, (1, 0, 2), strict=True):
        question = [*([{"type": "image"}] * count), {"type": "text", "text": "?"}]
        answer = {"role": "assistant", "content": "red"}
        text = tokenizer.apply_chat_template([{"role": "user", "content": question}, answer], tokenize=False)
        wanted = own(images=[opened[:count]] if count else None, text=[text], return_tensors="pt")
        assert wanted.pop("input_ids").tolist() == [example.input_ids]
        learned = [label for label in example.labels if label >= 0]
        assert tokenizer.decode(learned).replace(" ", "") == "red</s>"
        assert not set(learned) & images.image_tokens()
        for name, value in wanted.items():
            if f"{name}.rows" in batch:
                start, length = (int(batch[f"{name}.rows"][at].sum()) for at in (slice(0, row), slice(row, row + 1)))
                found = batch[name][start : start + length]
                assert torch.equal(found[tuple(map(slice, value.shape))], value)
            else:
                assert torch.equal(batch[name][row : row + 1, : value.shape[1]], value)


def test_of_all_tokens_those_of_images_are_not_learned(tiny_vision_folder: Path, pictures: Path) -> None:
    tokenizer, images = load_tokenizer(tiny_vision_folder), ImageProcessor(tiny_vision_folder)
    content = (pictures / "0.png").read_bytes()
    conversation = record(question="a")
    conversation["messages"][0]["content"].insert(0, {"type": "image", "image": {"bytes": content, "path": None}})
    (example,) = tokenize_all([conversation], tokenizer, learn="all", images=images).examples
    learned = tokenizer.decode([label for label in example.labels if label >= 0]).replace(" ", "")
    assert learned == "<user>a</s><assistant>red</s>"
    assert spans_around([(0, 9)], [((2, 3), (2, 7)), ((5, 6), (9, 14))]) == ((0, 2), (7, 9), (14, 17))
    assert spans_around([(6, 9)], [((2, 3), (2, 7))]) == ((10, 13),) and spans_around([], []) == ()


def test_equal_questions_about_other_pictures_are_other_records(tiny_vision_folder: Path, pictures: Path) -> None:
    tokenizer, images = load_tokenizer(tiny_vision_folder), ImageProcessor(tiny_vision_folder)
    made = tokenize_all([record("0.png"), record("1.png"), record("0.png")], tokenizer, images=images)
    one, other, again = made.examples.parts[0].arrays.digests.tolist()
    assert one == again != other and made.examples[0].input_ids == made.examples[1].input_ids


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (record("lost.png"), r"lost\.png does not exist; expected an image"),
        (record("text.png"), r"content\[0\] cannot be decoded: not an image that pillow knows; save it again"),
        (record("cut.png"), r"content\[0\] cannot be decoded: .*truncated.*; save it again, or leave it out"),
        (record("0.png", question="<image>"), r"must write <image> once for each image, here 1 times, and wrote it 2"),
    ],
)
def test_bad_images_are_bad_records(tiny_vision_folder: Path, pictures: Path, line: dict[str, Any], why: str) -> None:
    (pictures / "text.png").write_text("no picture")
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    tokenizer, images = load_tokenizer(tiny_vision_folder), ImageProcessor(tiny_vision_folder)
    with pytest.raises(CheckpointError, match=f"^record 2: .*{why}"):
        tokenize_all([record("0.png"), line], tokenizer, images=images)


def test_models_and_settings_that_take_no_images_say_so(
    tiny_vision_folder: Path, tiny_folder: Path, pictures: Path
) -> None:
    tokenizer, images = load_tokenizer(tiny_vision_folder), ImageProcessor(tiny_vision_folder)
    line = record("0.png")
    for wrong, why in (
        (ImageProcessor(tiny_folder), "has images, and .* takes text alone; name a vision-language model"),
        (ImageProcessor(tiny_vision_folder, text_only=True), "loaded without its vision tower; leave out --text-only"),
        (None, "has images, which are not read here; give text alone"),
    ):
        with pytest.raises(CheckpointError, match=why):
            tokenize_all([line], tokenizer, images=wrong)
    with pytest.raises(CheckpointError, match=r"its images end with token 7, which max_length 6 would cut; raise it"):
        tokenize_all([line], tokenizer, 6, images=images)
    examples = tokenize_all([line], tokenizer, images=images).examples
    with pytest.raises(ConfigError, match="examples with images each need a row of their own; leave out packing"):
        batches(examples, 1, 0, pad_token_id=0, packing=True, max_length=64, images=images)
    with pytest.raises(ConfigError, match="the examples have images; give images=ImageProcessor"):
        batches(examples, 1, 0, pad_token_id=0)
    read_later = ReadLater(examples)
    read_later.lengths = examples.lengths
    with pytest.raises(ConfigError, match="the examples have images; give images=ImageProcessor"):
        next(batches(read_later, 1, 0, pad_token_id=0))
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] }}"
    tokenizer.chat_template += "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    with pytest.raises(CheckpointError, match="wrote it 0 times; use a template that knows image parts"):
        tokenize_all([line], tokenizer, images=images)
