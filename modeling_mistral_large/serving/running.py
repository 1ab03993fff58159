"""Responses while they are generated: several choices of one request, and a client that may go away."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from fastapi.responses import StreamingResponse

from modeling_mistral_large.errors import MistralLargeError

from .chat_request import ChatRequest
from .completion_text import CompletionReader, Delta
from .engine_thread import EngineThread
from .json_fields import RequestError, failure_body
from .requests import GenerationRequest

if TYPE_CHECKING:
    from fastapi import Request

    from .token_stream import TokenStream

_logger = logging.getLogger("uvicorn.error")


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads the response."""


class RunningCompletion:
    """The choices of one request, which are generated at once.

    name: of the model, as the request has it.
    finish_reasons: of the choices; None before their end.
    """

    def __init__(
        self,
        engine: EngineThread,
        name: str,
        request: ChatRequest,
        choices: Sequence[tuple[GenerationRequest, CompletionReader]],
    ) -> None:
        self.request = request
        self.name = name
        self.created = int(time.time())
        self._engine = engine
        self._requests, self._readers = zip(*choices, strict=True)
        self._generations: list[TokenStream] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._completion_tokens = 0

    @property
    def finish_reasons(self) -> list[str | None]:
        return [reader.finish_reason for reader in self._readers]

    def usage(self) -> dict[str, Any]:
        """Return the tokens so far; the prompt counts once."""
        prompt = len(self._requests[0].prompt)
        cached = max((each.cached_tokens for each in self._generations), default=0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._completion_tokens,
            "total_tokens": prompt + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    async def deltas(self) -> AsyncIterator[tuple[int, Delta, str | None]]:
        """Generate; yield the choice's number, what was added to it and, once, why it ended.

        Raises what the engine raises; RequestError where the server is being stopped.
        """
        queue: asyncio.Queue[tuple[int, Delta, str | None] | Exception] = asyncio.Queue()
        self._generations = [self._engine.submit(request) for request in self._requests]
        self._tasks = [
            asyncio.create_task(self._run(index, generation, reader, queue.put_nowait))
            for index, (generation, reader) in enumerate(zip(self._generations, self._readers, strict=True))
        ]
        left = len(self._tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                self.cancel()
                raise item
            left -= item[2] is not None
            yield item

    async def _run(
        self, index: int, generation: "TokenStream", reader: CompletionReader, put: Callable[[Any], None]
    ) -> None:
        try:
            async for token in generation:
                self._completion_tokens += 1
                delta = reader.take(token)
                if delta:
                    put((index, delta, None))
                if reader.is_stopped:
                    generation.cancel()
                    break
            if generation.finish_reason is None and not reader.is_stopped:
                put(RequestError("the server is being stopped; ask again when it is up", status=503))
                return
            put((index, reader.finish(generation.finish_reason), reader.finish_reason))
        except Exception as error:  # Whatever it is, it is raised where the response is awaited.
            put(error)

    def cancel(self) -> None:
        """End what is left of it; the places in the engine are free after the forward pass that runs now."""
        for generation in self._generations:
            generation.cancel()
        for task in self._tasks:
            task.cancel()


def failure_of_stream(error: Exception) -> dict[str, Any]:
    """Return the body of an error that ends a stream, whose status has been sent; one of ours is logged."""
    status, body = failure_body(error)
    if status >= 500 and not isinstance(error, MistralLargeError):
        _logger.error("a response could not be generated", exc_info=error)
    return body


async def collect(completion: RunningCompletion, request: "Request") -> list[Delta]:
    """Return the whole choices.

    Raises:
        ClientGoneError: the client has gone before that; its places in the engine are free.
    """

    async def read() -> list[Delta]:
        choices = [Delta() for _ in completion.finish_reasons]
        async for index, delta, _ in completion.deltas():
            choices[index].add(delta)
        return choices

    work, gone = asyncio.create_task(read()), asyncio.create_task(_client_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGoneError
        return work.result()
    finally:
        completion.cancel()
        for task in (work, gone):
            task.cancel()
            # A cancelled task that nobody awaits is reported at its end.
            with suppress(asyncio.CancelledError, Exception):
                await task


async def _client_gone(request: "Request") -> None:
    """Return when the client has closed the connection; its request was read to the end."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):  # type: ignore[misc, unused-ignore]  # where FastAPI is not installed
    """A stream of server-sent events that frees the places of its completion whenever it ends."""

    def __init__(self, completion: RunningCompletion, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._completion = completion

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._completion.cancel()
