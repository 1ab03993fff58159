"""The tokens of a response as text, tool calls and log probabilities, while they come."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mistral_large_conversion.vocabulary import piece_bytes
from modeling_mistral_large.instruct.answer import EOS_ID, TOOL_CALLS_ID, AnswerEvent, AnswerStream, TextEvent

from .requests import FinishReason, GeneratedToken

# What the API has for a probability of 0.
SMALLEST_LOGPROB = -9999.0


@dataclass
class Delta:
    """What has been added to a response.

    logprobs: as the API has them, of the tokens of the text.
    """

    text: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.text or self.tool_calls or self.logprobs)

    def add(self, other: "Delta") -> None:
        """Append what came after."""
        self.text += other.text
        self.tool_calls += other.tool_calls
        self.logprobs += other.logprobs


class StopStrings:
    """Text that ends before the first stop string, however it is cut into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.is_stopped = False

    def feed(self, text: str) -> str:
        """Return the text that no stop string can begin in any more."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else text
        text = self._held + text
        # The one that is complete first, and of several that are, the longest.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max(_length_of_beginning(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back, as no stop string came of it."""
        text, self._held = self._held, ""
        return text


def _length_of_beginning(text: str, stop: str) -> int:
    """Return the length of the longest beginning of `stop` that the text ends with."""
    longest = min(len(stop) - 1, len(text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


class CompletionReader:
    """The tokens of one response, read one by one.

    pieces: of the vocabulary, by id.
    skipped: ids that are left out where the response is plain text; None for the format's responses, with tool calls.
    continues_text: whether the prompt ended in the assistant's own text, so that a first space is the model's.
    stops: strings that end the text.
    has_logprobs: whether log probabilities are wanted.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        *,
        skipped: frozenset[int] | None = None,
        continues_text: bool = False,
        stops: Sequence[str] = (),
        has_logprobs: bool = False,
    ) -> None:
        self._pieces = pieces
        self._skipped = skipped
        self._stream = AnswerStream(pieces, continues_text=continues_text)
        self._stops = StopStrings(stops)
        self._has_logprobs = has_logprobs
        self._is_start = not continues_text
        self._is_content = True
        # Characters that were read and given out, and tokens that are still to be, by the character they begin at.
        self._read = self._given = 0
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._has_calls = False
        self.finish_reason: str | None = None

    @property
    def is_stopped(self) -> bool:
        """Return whether a stop string has ended the text."""
        return self._stops.is_stopped

    def take(self, token: GeneratedToken) -> Delta:
        """Return what the next token completes."""
        if self._skipped is not None and token.id in self._skipped:
            return Delta()
        self._note_logprob(token)
        return self._delta(self._stream.feed([token.id]))

    def finish(self, reason: FinishReason | None) -> Delta:
        """Take the end of the response and return what was held back for it."""
        delta = Delta()
        if not self.is_stopped:
            delta.add(self._delta(self._stream.finish()))
        if not self.is_stopped:
            delta.text += self._give(self._stops.finish())
            delta.logprobs += [entry for _, entry in self._pending]
        self._pending = []
        if self.is_stopped:
            self.finish_reason = "stop"
        else:
            self.finish_reason = "tool_calls" if reason == "stop" and self._has_calls else reason
        return delta

    def _delta(self, events: Iterable[AnswerEvent]) -> Delta:
        delta = Delta()
        for event in events:
            if self.is_stopped:
                break
            if isinstance(event, TextEvent):
                self._read += len(event.text)
                delta.text += self._give(self._stops.feed(event.text))
            else:
                delta.text += self._give(self._stops.finish())
                delta.tool_calls.append(event.tool_call)
                self._has_calls = True
        while self._pending and self._pending[0][0] < self._given:
            delta.logprobs.append(self._pending.pop(0)[1])
        return delta

    def _give(self, text: str) -> str:
        self._given += len(text)
        return text

    def _note_logprob(self, token: GeneratedToken) -> None:
        """Keep the log probabilities of a token of the text; those of calls and of the end are not the API's."""
        is_first, self._is_start = self._is_start, False
        self._is_content = self._is_content and token.id != TOOL_CALLS_ID
        if not self._has_logprobs or not self._is_content or token.id == EOS_ID:
            return
        entry = self._entry(token.id, token.logprob, is_first)
        entry["top_logprobs"] = [self._entry(other, value, is_first) for other, value in token.top_logprobs]
        self._pending.append((self._read, entry))

    def _entry(self, token_id: int, logprob: float | None, is_first: bool) -> dict[str, Any]:
        piece = self._pieces[token_id] if 0 <= token_id < len(self._pieces) else ""
        # The ▁ before every text is no space of it.
        written = piece_bytes(piece.removeprefix("▁") if is_first else piece)
        value = SMALLEST_LOGPROB if logprob is None else max(logprob, SMALLEST_LOGPROB)
        return {"token": written.decode("utf-8", "replace"), "logprob": value, "bytes": list(written)}
