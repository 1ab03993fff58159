"""The turns of a conversation that its prompt has room for: where it is too long, the oldest ones are left out."""

from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
# Of the room, what is free after turns were left out, so that not every turn changes the beginning of the prompt.
FREE = 8


class ContextWindow:
    """What is left out of prompts; a turn is a message of the user's with all that follows until the next one.

    count: returns the tokens of the prompt of some messages.
    """

    def __init__(self, count: Callable[[list[Message]], int], context_length: int) -> None:
        self._count, self._context_length = count, context_length
        # Messages at the beginning that are left out.
        self.dropped: list[Message] = []

    def kept(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages without those that were left out last, if they begin with them."""
        has_same_start = list(messages[: len(self.dropped)]) == self.dropped
        return list(messages[len(self.dropped) :] if has_same_start else messages)

    def fit(self, messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
        """Return the messages with those turns that fit next to a response; the last turn always stays.

        A response gets the tokens it may have, but no more than half of the context.
        """
        room = self._context_length - min(max_new_tokens, self._context_length // 2)
        if self._count(list(messages)) <= room:
            self.dropped = []
            return list(messages)
        kept = self.kept(messages)
        first = len(messages) - len(kept)
        later = [index for index in range(first + 1, len(messages)) if messages[index]["role"] == "user"]
        if not later or (first and self._count(kept) <= room):
            return kept
        smaller = room - room // FREE
        # The first turn from which on all fits; the prompt grows with each that comes before it.
        low, high = 0, len(later) - 1
        while low < high:
            middle = (low + high) // 2
            if self._count(list(messages[later[middle] :])) <= smaller:
                high = middle
            else:
                low = middle + 1
        self.dropped = list(messages[: later[low]])
        return list(messages[later[low] :])
