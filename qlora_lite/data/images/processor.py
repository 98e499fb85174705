"""What a vision-language model gets of images: their tokens in the text, and arrays, by the processor of transformers.

A chat template writes a place for each image. The processor replaces it by as many tokens as the model computes for the
image, which depends on its size. An image is decoded for its tokens, when its record is read, and for its arrays, each
time that its batch is made.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lite.architecture import ROWS
from qlora_lite.checkpoints import hub
from qlora_lite.data.images.image import Image, ImageStore, KeptImage
from qlora_lite.errors import CheckpointError, ConfigError, QLoRAError

Span = tuple[int, int]
# Processors whose tokens and arrays were compared with those that transformers computes for whole conversations.
KNOWN = (
    *("Gemma3Processor", "Idefics3Processor", "LlavaProcessor", "Qwen2_5_VLProcessor", "Qwen2VLProcessor"),
    *("Qwen3VLProcessor", "SmolVLMProcessor"),
)
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
NOT_ARRAYS = ("input_ids", "attention_mask", "text_replacement_offsets", *TOKEN_TYPES)


class ImageProcessor:
    """The processor of a checkpoint, loaded with the first image.

    path_or_id: of the checkpoint. text_only: whether the model is loaded without its vision tower, and takes no images.
    """

    def __init__(self, path_or_id: str | Path, text_only: bool = False) -> None:
        self.path_or_id, self.text_only = path_or_id, text_only
        self.store = ImageStore()

    @cached_property
    def _processor(self) -> Any:
        if self.text_only:
            raise CheckpointError("has images, and the model is loaded without its vision tower; leave out --text-only")
        found = hub.load_processor(self.path_or_id)
        if found is None:
            raise CheckpointError(f"has images, and {self.path_or_id} takes text alone; name a vision-language model")
        if type(found).__name__ not in KNOWN:
            raise ConfigError(
                f"images of a {type(found).__name__} cannot be trained on; known are {', '.join(sorted(KNOWN))}"
            )
        return found

    def _called(self, images: Sequence[bytes], names: Sequence[str], text: str) -> dict[str, Any]:
        decoded = [_decoded(content, name) for content, name in zip(images, names, strict=True)]
        try:
            made = self._processor(
                images=[decoded], text=[text], return_tensors="pt", return_text_replacement_offsets=True
            )
        except (QLoRAError, MemoryError):
            raise
        except Exception as error:  # the code of any processor
            first_line = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{type(self._processor).__name__} refuses {', '.join(names)}: {first_line}"
            ) from error
        return dict(made)

    def check_known(self) -> None:
        """Loads the processor. Raises CheckpointError or ConfigError if the model takes no images, or it is unknown."""
        _ = self._processor

    @property
    def place(self) -> str:
        """What a chat template writes for an image."""
        return str(self._processor.image_token)

    def in_text(
        self, text: str, spans: Sequence[Span], images: Sequence[tuple[int, Image]], last: int
    ) -> tuple[str, tuple[Span, ...], tuple[KeptImage, ...]]:
        """Returns a rendering of a conversation with the tokens of its images, its learned spans, and the images.

        images: of the conversation, with the indices of their messages. last: the message with which the rendering may
        end. Tokens of images are not learned.
        """
        found = [image for _, image in images]
        before = [image for index, image in images if index < last]
        if text.count(self.place) == len(before):
            found = before
        whole, moved, kept = self.expanded(text, found)
        return whole, spans_around(spans, moved), tuple(kept)

    def cut(self, input_ids: Sequence[int], max_length: int | None) -> str | None:
        """Why `max_length` must not cut an example with images: it would cut their tokens. None if it does not."""
        if max_length is None or len(input_ids) <= max_length:
            return None
        tokens = self.image_tokens()
        end = max((place for place, token in enumerate(input_ids, 1) if token in tokens), default=0)
        if end <= max_length:
            return None
        return f"its images end with token {end}, which max_length {max_length} would cut; raise it (--max-length)"

    def expanded(self, text: str, images: Sequence[Image]) -> tuple[str, list[tuple[Span, Span]], list[KeptImage]]:
        """Returns a text with the tokens of its images, the places of these before and behind, and the images.

        Raises CheckpointError unless the text has one place for each image, and for images that cannot be read.
        """
        written = text.count(self.place)
        if written != len(images):
            raise CheckpointError(
                f"the chat template must write {self.place} once for each image, here {len(images)} times, and wrote "
                f"it {written} times; use a template that knows image parts, and no such token in the text"
            )
        contents = [image.read() for image in images]
        made = self._called(contents, [image.name for image in images], text)
        moved = made["text_replacement_offsets"][0]
        parts, place = [], 0
        for found in moved:
            parts += [text[place : found["span"][0]], found["replacement"]]
            place = found["span"][1]
        kept = [self.store.keep(image, content) for image, content in zip(images, contents, strict=True)]
        return "".join([*parts, text[place:]]), [(found["span"], found["new_span"]) for found in moved], kept

    def batch(self, rows: Sequence[Sequence[KeptImage]], input_ids: Tensor) -> dict[str, Tensor]:
        """Returns the arrays of the images of some rows, in their order, and the types of the tokens.

        For each array, `<name>.rows` has the number of entries of its first dimension that belong to each row, and
        `images.rows` the number of images.
        """
        made = [self._arrays(images) if images else {} for images in rows]
        batch = {f"images{ROWS}": torch.tensor([len(images) for images in rows])}
        for name in dict.fromkeys(name for arrays in made for name in arrays):
            found = [arrays[name] for arrays in made if name in arrays]
            batch[name] = torch.cat(_padded(found))
            batch[f"{name}{ROWS}"] = torch.tensor([len(arrays[name]) if name in arrays else 0 for arrays in made])
        for name in TOKEN_TYPES:
            if name in self._processor.model_input_names:
                batch[name] = torch.tensor(self._processor.create_mm_token_type_ids(input_ids.tolist()))
        return batch

    def _arrays(self, images: Sequence[KeptImage]) -> Mapping[str, Tensor]:
        contents = [image.read() for image in images]
        made = self._called(contents, [image.name for image in images], self.place * len(images))
        return {name: value for name, value in made.items() if name not in NOT_ARRAYS and isinstance(value, Tensor)}

    def image_tokens(self) -> set[int]:
        """Returns the ids of the tokens at which the model puts features of images."""
        return {int(token) for token in self._processor.image_token_ids if token is not None}


def spans_around(spans: Sequence[Span], moved: Sequence[tuple[Span, Span]]) -> tuple[Span, ...]:
    """Returns spans of a text as they are in its expanded text, without the tokens of images.

    moved: the places of images before and behind the expansion, as `ImageProcessor.expanded` returns them.
    """

    def now(place: int) -> int:
        return place + sum((b - a) - (stop - start) for (start, stop), (a, b) in moved if stop <= place)

    found: list[Span] = []
    for start, stop in spans:
        begin = now(start)
        for (first, last), (a, b) in moved:
            if start <= first and last <= stop:
                found.append((begin, a))
                begin = b
        found.append((begin, now(stop)))
    return tuple(span for span in found if span[0] < span[1])


def _padded(arrays: Sequence[Tensor]) -> list[Tensor]:
    """Returns arrays with zeros behind them, so that they differ in the first dimension alone."""
    largest = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
    found = []
    for array in arrays:
        missing = [most - size for most, size in zip(largest, array.shape[1:], strict=True)]
        found.append(
            F.pad(array, [side for size in reversed(missing) for side in (0, size)]) if any(missing) else array
        )
    return found


def _decoded(content: bytes, name: str) -> Any:
    from PIL import Image as Pillow
    from PIL import ImageOps, UnidentifiedImageError

    try:
        with Pillow.open(io.BytesIO(content)) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # pillow raises many kinds for damaged files
        why = "not an image that pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise CheckpointError(f"{name} cannot be decoded: {why}; save it again, or leave it out") from error
