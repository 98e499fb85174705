"""Images of records: where they lie, and what a vision-language model gets of them.

In reading order:

image       an image of a record: a file or bytes, and the parts of messages that name it
processor   tokens and arrays of images, by the processor of a model
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.data.images.processor import ImageProcessor as ImageProcessor

__getattr__, __dir__, __all__ = lazy_names(__name__, {"processor": "ImageProcessor"})
