"""The renderings of a conversation and of its beginnings, in which every piece of text is found.

A conversation is rendered twice: as it is, and with marks of a private-use area around every piece of text that its
author wrote. A template copies marks along with the text. Without its marks the second rendering has to equal the
first; then the marks tell where each piece stands, however the template trims, quotes or reorders it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlora_lite.data.chat.marks import MarkedMessages, Rendering, without_marks
from qlora_lite.data.chat.messages import ASSISTANT, Message
from qlora_lite.data.chat.turns import ChatTemplateError, Span, Writer
from qlora_lite.errors import listing


class Renderings:
    """A conversation as a template writes it.

    pieces: the texts of the author, in order. of: the numbers of the pieces of each message. numbers: the values of
    each message that bear no marks.
    """

    def __init__(self, messages: Sequence[Message], writer: Writer) -> None:
        marked = MarkedMessages(messages)
        self.messages, self.pieces, self.numbers = messages, marked.pieces, marked.numbers
        self.of: list[list[int]] = [[] for _ in messages]
        for number, piece in enumerate(self.pieces):
            self.of[piece.message].append(number)
        self._marked, self._writer = marked.messages, writer
        self._known: dict[tuple[int, bool], Rendering] = {}

    def up_to(self, count: int, for_generation: bool = False) -> Rendering:
        """The first `count` messages.

        Raises ChatTemplateError if marks change what the template writes, or if it leaves out text of others than
        answers.
        """
        key = (count, for_generation)
        if key not in self._known:
            text = self._writer.write(self.messages[:count], for_generation)
            rendering = self.with_places(count, for_generation)
            if rendering.text != text:
                raise ChatTemplateError(
                    "the chat template computes with the text of messages, so answers cannot be found"
                )
            if len(rendering.spans) < len(self.pieces):
                asked = [index for index in range(count) if self.messages[index]["role"] != ASSISTANT]
                self.check_written(rendering, [number for index in asked for number in self.of[index]])
            self._known[key] = rendering
        return self._known[key]

    def with_places(self, count: int, for_generation: bool) -> Rendering:
        """The rendering with marks, unchecked."""
        write_marked = self._writer.write_marked or self._writer.write
        return without_marks(write_marked(self._marked[:count], for_generation))

    def check_written(self, rendering: Rendering, numbers: Iterable[int]) -> None:
        """Raises ChatTemplateError, naming the fields, unless all of these pieces are in a rendering."""
        pieces = [self.pieces[number] for number in numbers if number not in rendering.spans]
        if pieces:
            lost = dict.fromkeys(f"messages[{piece.message}].{piece.field}" for piece in pieces)
            raise ChatTemplateError(f"the chat template leaves out {listing(lost)}")

    def extent(self, rendering: Rendering, index: int) -> Span:
        """From the start of the first piece of a message to the end of the last one."""
        spans = [rendering.spans[number] for number in self.of[index]]
        return min(start for start, _ in spans), max(stop for _, stop in spans)
