"""Responses as a thread generates them and an event loop reads them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from modeling_mistral_large.errors import SettingError
from modeling_mistral_large.serving.requests import FinishReason, GeneratedToken, GenerationRequest


def check_request(model: Any, request: GenerationRequest) -> None:
    """Refuse what no forward pass takes, before it is in one with the requests of others.

    Raises SettingError.
    """
    config, prompt = model.config, request.prompt
    limit: int = config.max_position_embeddings
    if not prompt or request.max_new_tokens < 1:
        raise SettingError("a request: a prompt has at least one token, and a response too; add what is missing")
    if len(prompt) + request.max_new_tokens > limit:
        raise SettingError(
            f"a request of {len(prompt)} tokens and {request.max_new_tokens} new ones: the model's context is {limit}; "
            "shorten the prompt or ask for fewer tokens"
        )
    # On a GPU an index out of range ends the process's use of it.
    for name, tokens in (("prompt", prompt), ("logit_bias", tuple(request.choice.logit_bias))):
        if tokens and (min(tokens) < 0 or max(tokens) >= config.vocab_size):
            raise SettingError(
                f"{name}: token ids from {min(tokens)} to {max(tokens)}; the model's are 0 to {config.vocab_size - 1}; "
                "use the tokenizer of the model"
            )
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= config.vocab_size:
        raise SettingError(f"top_logprobs {request.top_logprobs}: from 0 to {config.vocab_size}; choose one of these")


class TokenStream:
    """A response while it is generated: an asynchronous iterator of its tokens, the end-of-sequence token included.

    A thread puts them in, through an `Outbox`, and they are read in the event loop, where an error of the engine is
    raised.

    on_cancel: called in the event loop's thread.
    finish_reason: why it ended; None before that.
    cached_tokens: how many tokens of the prompt were in the cache before.
    """

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self.finish_reason: FinishReason | None = None
        self.cached_tokens = 0
        self.is_cancelled = False
        self.loop = asyncio.get_running_loop()
        self._on_cancel = on_cancel
        self._items: asyncio.Queue[GeneratedToken | Exception | None] = asyncio.Queue()
        self._has_ended = False

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> GeneratedToken:
        item = None if self._has_ended else await self._items.get()
        if isinstance(item, GeneratedToken):
            return item
        self._has_ended = True
        if item is None:
            raise StopAsyncIteration
        raise item

    def cancel(self) -> None:
        """End the response where it is; its place is free after the forward pass that runs now."""
        if self.finish_reason is None and not self.is_cancelled:
            self.is_cancelled = True
            self._items.put_nowait(None)
            self._on_cancel()

    def receive(self, item: GeneratedToken | Exception | FinishReason | None) -> None:
        """Take the next token, the reason of the end, or an error; in the event loop's thread."""
        if isinstance(item, str):
            self.finish_reason, item = item, None
        self._items.put_nowait(item)


class Outbox:
    """What a step has for the streams, sent at once: an event loop is woken once for all of them."""

    def __init__(self) -> None:
        self._items: dict[asyncio.AbstractEventLoop, list[tuple[TokenStream, Any]]] = defaultdict(list)

    def put(self, stream: TokenStream, *items: GeneratedToken | Exception | FinishReason | None) -> None:
        """Keep tokens, the reason of the end, or an error for a stream."""
        self._items[stream.loop].extend((stream, item) for item in items)

    def send(self) -> None:
        """Hand everything over. Streams whose event loop is closed are nobody's any more, and cancelled."""
        for loop, items in self._items.items():
            try:
                loop.call_soon_threadsafe(_hand_out, items)
            except RuntimeError:
                for stream, _ in items:
                    stream.is_cancelled = True
        self._items.clear()


def _hand_out(items: list[tuple[TokenStream, Any]]) -> None:
    for stream, item in items:
        stream.receive(item)
