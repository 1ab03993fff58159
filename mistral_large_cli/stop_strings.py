"""Stop strings in the events of a response: it ends before the first of them, and no part of one is shown."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modeling_mistral_large.instruct import AnswerStream


class StoppedText:
    """An `AnswerStream` whose text ends before the first stop string; what may begin one is held back."""

    def __init__(self, stream: "AnswerStream", stop: "Sequence[str]") -> None:
        self._stream, self._stop = stream, tuple(stop)
        self._held = ""
        self._said: list[str] = []
        self.is_stopped = False

    def feed(self, ids: list[int]) -> list[Any]:
        """Take the next ids and return what they complete."""
        return self._filtered(self._stream.feed(ids))

    def finish(self) -> list[Any]:
        """Take the end of the response and return what was held back for it."""
        return [*self._filtered(self._stream.finish()), *self._released()]

    def message(self) -> dict[str, Any]:
        """Return the response as a message; one that a stop string ended calls no tools."""
        if self.is_stopped:
            return {"role": "assistant", "content": "".join(self._said)}
        return self._stream.parsed.message

    def _filtered(self, events: "Sequence[Any]") -> list[Any]:
        from modeling_mistral_large.instruct import TextEvent

        if not self._stop:
            return list(events)
        passed: list[Any] = []
        for event in events:
            if self.is_stopped:
                break
            if isinstance(event, TextEvent):
                passed += self._say(event.text)
            else:
                passed += [*self._released(), event]
        return passed

    def _say(self, text: str) -> list[Any]:
        text = self._held + text
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return self._text(text[: min(found)])
        begun = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - begun :]
        return self._text(text[: len(text) - begun])

    def _released(self) -> list[Any]:
        held, self._held = self._held, ""
        return [] if self.is_stopped else self._text(held)

    def _text(self, text: str) -> list[Any]:
        from modeling_mistral_large.instruct import TextEvent

        self._said.append(text)
        return [TextEvent(text)] if text else []


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
