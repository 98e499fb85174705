"""Ends an answer where one of some texts begins. The text is not a part of the answer, also if it comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopTexts:
    """Passes on the pieces of an answer up to the first stop text. found: whether there was one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""
        self.found = False

    def add(self, piece: str) -> str:
        """Returns what can be passed on: what no stop text may begin in."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        kept = max((self._begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def rest(self) -> str:
        """Returns what was held back, at the end of the answer."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """How many characters at the end of a text are the beginning of a stop text."""
        return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
