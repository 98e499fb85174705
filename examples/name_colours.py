"""Does a vision-language model learn to name a colour from a picture, with its vision tower frozen and adapted?

    python examples/name_colours.py                       # both, on a random model of two layers: half a minute
    python examples/name_colours.py --family qwen3_vl     # another family
    python examples/name_colours.py --tiny                # few steps, which learn nothing

Every picture is a noisy area of one colour on a noisy ground, of another size, shade and place each time. The model is
asked for the colour; all pictures of the test are new. Prints one JSON line: the share of right answers among held-out
pictures before and after training (`frozen`, `adapted`), and the losses.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from qlora_lite import LoraConfig, TrainConfig, add_lora_, load_quantized, train
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.data import batches, tokenize_sources
from qlora_lite.data.images import ImageProcessor
from tiny_vision_model import FAMILIES, make_tiny_vision_model

COLOURS = {"red": (220, 40, 40), "green": (40, 190, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
TARGETS = {"frozen": "all-linear", "adapted": "all-linear-with-towers"}
PICTURES, HELD_OUT, STEPS, TINY_STEPS = 160, 60, 80, 3
GOAL = 0.9


def picture(colour: str, choose: random.Random) -> Any:
    """A picture of this colour."""
    from PIL import Image

    width, height = (choose.randint(28, 56) for _ in range(2))
    noise = torch.Generator().manual_seed(choose.randrange(1 << 30))
    pixels = torch.full((height, width, 3), float(choose.randint(90, 160)))
    left, top = choose.randint(0, width // 4), choose.randint(0, height // 4)
    shade = choose.uniform(0.8, 1.1)
    pixels[top : top + 3 * height // 4, left : left + 3 * width // 4] = torch.tensor(COLOURS[colour]) * shade
    pixels += 12 * torch.randn(pixels.shape, generator=noise)
    return Image.frombytes("RGB", (width, height), pixels.clamp(0, 255).byte().numpy().tobytes())


def write_records(folder: Path, count: int, seed: int) -> Path:
    """Writes pictures and a file of conversations about them; returns the file."""
    folder.mkdir()
    choose, lines = random.Random(seed), []
    for number in range(count):
        colour = choose.choice(list(COLOURS))
        picture(colour, choose).save(folder / f"{number}.png")
        question = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "?"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": colour}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "records.jsonl"


@torch.no_grad()
def accuracy(model: Any, held_out: Any) -> float:
    """The share of batches of one picture whose learned tokens are all the likeliest ones."""
    model.eval()
    right = []
    for batch in held_out:
        labels = batch.pop("labels")[:, 1:]
        inputs = {name: value for name, value in batch.items() if not name.endswith(".rows")}
        answers = model(**inputs, use_cache=False).logits[:, :-1].argmax(-1)
        right.append(bool(((answers == labels) | (labels == -100)).all()))
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="smolvlm", choices=[*FAMILIES])
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    options = parser.parse_args()
    steps, some = (TINY_STEPS, 8) if options.tiny else (STEPS, None)
    figures: dict[str, Any] = {"family": options.family}
    with tempfile.TemporaryDirectory() as place:
        folder = make_tiny_vision_model(Path(place) / "model", options.family)
        counts = [some or count for count in (PICTURES, HELD_OUT)]
        files = [write_records(Path(place) / f"set{seed}", count, seed) for seed, count in enumerate(counts)]
        tokenizer, images = load_tokenizer(folder), ImageProcessor(folder)
        learned, held_out = (tokenize_sources([file], tokenizer, images=images).examples for file in files)
        for name, targets in TARGETS.items():
            torch.manual_seed(0)
            model = load_quantized(folder)
            unused = ["encoder.layers.1"] if options.family == "llava" and name == "adapted" else None
            add_lora_(model, LoraConfig(rank=8, alpha=32, target_modules=targets, exclude_modules=unused))
            made = {"pad_token_id": tokenizer.pad_token_id, "images": images}
            before = accuracy(model, batches(held_out, 1, 0, epochs=1, **made))
            config = TrainConfig(steps=steps, learning_rate=1e-2, checkpointing="none")
            result = train(model, batches(learned, 8, 0, **made), config, progress=False)
            after = accuracy(model, batches(held_out, 1, 0, epochs=1, **made))
            losses = [result.losses[0], result.losses[-1]]
            print(f"tower {name}: loss {losses[0]:.3f} -> {losses[1]:.3f}, {before:.0%} -> {after:.0%} right")
            figures |= {name: after, f"{name}_before": before, f"{name}_losses": losses}
    print(json.dumps(figures))
    if not options.tiny and min(figures["frozen"], figures["adapted"]) < GOAL:
        sys.exit(f"less than {GOAL:.0%} of the answers are right")


if __name__ == "__main__":
    main()
