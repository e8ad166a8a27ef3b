"""From tokens to text that can be shown: whole characters only, and nothing that may yet be a stop string."""

from __future__ import annotations

import codecs

from stockpot.engine.driver import Vocabulary


class TextStream:
    """The text of one choice, as it grows.

    What is shown depends on the bytes alone, not on where tokens cut them: bytes are decoded as UTF-8 with
    U+FFFD for what cannot be, and output ends before the stop string that is complete first (of several
    complete at the same character, the longest). The stop string itself is never shown.
    """

    def __init__(self, vocabulary: Vocabulary, stop: tuple[str, ...] = ()) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._searches = tuple(_Search(text) for text in sorted(set(stop), key=len, reverse=True))
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the text."""

    def push(self, token: int) -> str:
        """Take a token; returns the text that can be shown now, perhaps "". After a stop, always ""."""
        return self._take(self._decoder.decode(self._vocabulary.piece(token)))

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        shown = self._take(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    def _take(self, text: str) -> str:
        if self.stopped is not None or not text:
            return ""
        if not self._searches:
            return text
        # `_held` is always as long as the longest beginning of a stop string that the text ends with.
        known = self._held + text
        for place, character in enumerate(text, start=len(self._held) + 1):
            for search in self._searches:
                if search.advance(character):
                    self.stopped = search.text
                    self._held = ""
                    return known[: place - len(search.text)]
        hold = max(search.matched for search in self._searches)
        cut = len(known) - hold
        self._held = known[cut:]
        return known[:cut]


class _Search:
    """Knuth, Morris and Pratt (1977), a character at a time: `matched` is the length of the longest
    beginning of `text` that the characters so far end with."""

    __slots__ = ("_fallback", "matched", "text")

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("a stop string must not be empty")
        self.text = text
        self.matched = 0
        self._fallback = [0] * len(text)
        length = 0
        for place in range(1, len(text)):
            while length and text[place] != text[length]:
                length = self._fallback[length - 1]
            if text[place] == text[length]:
                length += 1
            self._fallback[place] = length

    def advance(self, character: str) -> bool:
        """Take a character; returns whether `text` is complete. Must not be called after that."""
        while self.matched and character != self.text[self.matched]:
            self.matched = self._fallback[self.matched - 1]
        if character == self.text[self.matched]:
            self.matched += 1
        return self.matched == len(self.text)
