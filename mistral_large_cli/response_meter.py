"""How fast a response came, how much of the context is used, and what drafts have done for it."""

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modeling_mistral_large.generation import Speculation


class ResponseMeter:
    """What is said of one response, for people.

    speculation: counts what was drafted. context_length: of the model, in tokens.
    """

    def __init__(self, speculation: "Speculation", context_length: int, *, has_drafts: bool) -> None:
        self.speculation, self.has_drafts = speculation, has_drafts
        self._context_length = context_length
        self._prompt = self._written = 0
        self._start = self._first = self._last = 0.0

    def restart(self, prompt: int) -> None:
        """Begin with a prompt of some tokens."""
        self.speculation.restart()
        self._prompt, self._written = prompt, 0
        self._start, self._first, self._last = time.perf_counter(), 0.0, 0.0

    def tick(self, tokens: int) -> None:
        """Take the time of tokens."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._written += tokens

    @property
    def used(self) -> int:
        """How many tokens of the context prompt and response take."""
        return self._prompt + self._written

    def context(self) -> str:
        """Return how much of the context is used."""
        return f"{self.used:,} of {self._context_length:,} tokens of context"

    def drafts(self) -> str:
        """Return the speed after the first token and how many drafted tokens were accepted."""
        counts = self.speculation
        if not counts.proposed:
            return f"{self._speed()}; none drafted"
        return f"{self._speed()}; {counts.accepted} of {counts.proposed} drafted tokens accepted"

    def line(self) -> str:
        """Return all of it, for the terminal."""
        speed = self.drafts() if self.has_drafts else self._speed()
        return f"{speed}; first token after {self._first - self._start:.2f} s; {self.context()}"

    def _speed(self) -> str:
        seconds = self._last - self._first
        return f"{(self._written - 1) / seconds:.3g} tokens/s" if self._written > 1 and seconds else "one token"
