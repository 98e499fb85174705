"""Tests of training with images: losses against transformers, parts of batches, resumed runs, exports, and learning."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from safetensors.torch import load_file

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, export_merged, load_quantized, train
from qlora_lite.checkpoints.hub import load_processor, load_tokenizer
from qlora_lite.data import batches, tokenize_sources
from qlora_lite.data.batching import Batch, has_images, lacks_images, rows_between
from qlora_lite.data.images import ImageProcessor
from qlora_lite.data.stream import check_batch
from qlora_lite.errors import ConfigError, TrainingError
from qlora_lite.training.distributed import split_in_two
from qlora_lite.training.objective.losses import logit_free_loss, logits_loss

PLAIN = QuantConfig(format="none")
EVERYTHING = LoraConfig(rank=4, target_modules="all-linear-with-towers")


class Broken(list[Batch]):
    """Batches of which the third cannot be read."""

    def __iter__(self) -> Iterator[Batch]:
        yield from self[:2]
        raise RuntimeError("after two batches")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records with one picture, none and two, of other sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number, count in enumerate((1, 0, 2, 1)):
        Pillow.new("RGB", (30 + 15 * number, 30), (200, 60 * number, 90)).save(folder / f"{number}.png")
        images = [{"type": "image", "path": f"{max(0, number - n)}.png"} for n in range(count)]
        content = [*images, {"type": "text", "text": "what is it?"}]
        answer = {"role": "assistant", "content": f"no {number}"}
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}, answer]}))
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def examples_of(pictures: Path, folder: Path) -> tuple[Any, ImageProcessor]:
    images = ImageProcessor(folder)
    return tokenize_sources([pictures / "records.jsonl"], load_tokenizer(folder), images=images).examples, images


def made(pictures: Path, folder: Path, rows: int = 4, **options: Any) -> Iterator[Batch]:
    examples, images = examples_of(pictures, folder)
    return batches(examples, rows, 0, pad_token_id=0, images=images, **options)


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_the_loss_is_that_of_each_example_alone_in_transformers(
    make_tiny_vision_model: Callable[..., Path], pictures: Path, tmp_path: Path, family: str
) -> None:
    folder = make_tiny_vision_model(tmp_path, family)
    model, processor = load_quantized(folder, PLAIN, dtype=torch.float32), load_processor(folder)
    examples, images = examples_of(pictures, folder)
    (batch,) = batches(examples, 4, 0, pad_token_id=0, images=images, epochs=1)
    check_batch(batch, None)
    expected = 0.0
    for example in examples:
        opened = [Pillow.open(image.path) for image in example.images]
        arrays = processor(images=[opened], text=[processor.image_token * len(opened)]) if opened else {}
        inputs = {name: torch.as_tensor(value) for name, value in arrays.items() if name.startswith(("pixel", "image"))}
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        if family == "qwen3_vl":
            inputs["mm_token_type_ids"] = torch.tensor(processor.create_mm_token_type_ids(ids.tolist()))
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits
        expected += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
    with torch.no_grad():
        assert float(logit_free_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
        assert float(logits_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
        halves = [float(logit_free_loss(model, half)) for half in split_in_two(batch)]
    assert sum(halves) == pytest.approx(expected, rel=1e-5)


def test_rows_of_a_batch_take_their_images_along(tiny_vision_folder: Path, pictures: Path) -> None:
    (batch,) = made(pictures, tiny_vision_folder, epochs=1)
    parts = [rows_between(batch, row, row + 1) for row in range(4)]
    counts = batch["images.rows"].tolist()
    assert sorted(counts) == [0, 1, 1, 2] and [int(part["images.rows"].sum()) for part in parts] == counts
    assert [part["pixel_values"].shape[0] if count else None for part, count in zip(parts, counts, strict=True)] == [
        1 if count else None for count in counts
    ]
    alone = parts[counts.index(0)]
    assert "pixel_values" not in alone and lacks_images(alone) and has_images(alone) and not lacks_images(batch)
    for part in parts:
        check_batch(part, None)
    joined = torch.cat([part["pixel_values"] for part in parts if "pixel_values" in part])
    assert torch.equal(joined, batch["pixel_values"])
    with pytest.raises(ConfigError, match="pixel_values of a batch must be a tensor with a row for each"):
        check_batch({**batch, "pixel_values": batch["pixel_values"][:1]}, None)


def test_a_tower_is_trained_and_a_run_goes_on_as_if_it_had_not_stopped(
    tiny_vision_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    def run(name: str, cut: bool = False, **options: Any) -> list[float]:
        torch.manual_seed(0)
        model = load_quantized(tiny_vision_folder)
        add_lora_(model, EVERYTHING)
        config = TrainConfig(steps=4, learning_rate=1e-2, save_steps=2)
        stream = list(made(pictures, tiny_vision_folder, 1, epochs=1))
        assert sum(map(lacks_images, stream)) == 1
        stream.sort(key=lacks_images, reverse=True)  # text alone in the first step
        stream = Broken(stream) if cut else stream
        return train(model, stream, config, output_dir=tmp_path / name, progress=False, **options).losses

    whole = run("whole")
    with pytest.raises(RuntimeError, match="after two batches"):
        run("parts", cut=True)
    assert run("parts", resume=True) == whole
    one, other = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    moved = [name for name, value in one.items() if "vision_model" in name and "lora_B" in name and bool(value.any())]
    assert len(moved) == 12


def test_adapters_that_no_image_reaches_are_told(tiny_vision_folder: Path, pictures: Path) -> None:
    model: Any = load_quantized(tiny_vision_folder)
    add_lora_(model, EVERYTHING)
    layers = model.model.vision_model.encoder.layers
    layers[1].forward = lambda states, *args, **options: states
    with pytest.raises(TrainingError, match=r"6 of 27 adapted layers get no gradient in the first step: encoder\.lay"):
        train(model, made(pictures, tiny_vision_folder), TrainConfig(steps=1), progress=False)


def test_an_export_reads_pictures_like_the_model(tiny_vision_folder: Path, pictures: Path, tmp_path: Path) -> None:
    import transformers

    model = load_quantized(tiny_vision_folder, dtype=torch.float32)
    add_lora_(model, EVERYTHING)
    train(model, made(pictures, tiny_vision_folder), TrainConfig(steps=2, learning_rate=1e-2), progress=False)
    export_merged(model, tmp_path / "out", torch.float32)
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tiny_vision_folder / name).read_bytes()
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    batch = next(made(pictures, tmp_path / "out"))
    inputs = {name: value for name, value in batch.items() if name != "labels" and not name.endswith(".rows")}
    with torch.no_grad():
        expected, found = (one.eval()(**inputs).logits for one in (model, again))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_colour_is_learned_from_a_picture(
    import_script: Callable[[str], Any], tiny_vision_folder: Path, tmp_path: Path
) -> None:
    """examples/name_colours.py asks for more colours, of a frozen tower too."""
    script = import_script("examples/name_colours.py")
    files = [script.write_records(tmp_path / f"set{seed}", count, seed) for seed, count in ((0, 48), (1, 12))]
    tokenizer, images = load_tokenizer(tiny_vision_folder), ImageProcessor(tiny_vision_folder)
    learned, held_out = (tokenize_sources([file], tokenizer, images=images).examples for file in files)
    model = load_quantized(tiny_vision_folder)
    add_lora_(model, LoraConfig(rank=8, alpha=32))
    stream = batches(learned, 8, 0, pad_token_id=0, images=images)
    train(model, stream, TrainConfig(steps=48, learning_rate=2e-2, checkpointing="none"), progress=False)
    assert script.accuracy(model, batches(held_out, 1, 0, pad_token_id=0, images=images, epochs=1)) >= 0.9
