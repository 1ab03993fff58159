"""A server whose model says what a test wants: OpenAI's chat completions from a script, with the routes of the page."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.serving.page import page_routes

from .servers import HOST, free_port

MODEL = "scripted"
CONTEXT = 4096


@dataclass
class Reply:
    """What the model says next.

    pieces: the texts of the chunks, in turn.
    calls: names and JSON texts of the arguments of the calls after them.
    pause: seconds before each chunk.
    error: instead of a response: status and message; with status 200, an error in the middle of the stream.
    """

    pieces: list[str] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)
    pause: float = 0
    error: tuple[int, str] | None = None
    finish_reason: str | None = None


@dataclass
class ScriptedChat:
    """The server, what it will say, and what it was asked."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    disconnects: int = 0

    def forget(self) -> None:
        """Begin anew."""
        self.replies = []
        self.disconnects = 0
        for record in (self.requests, self.bodies, self.authorizations):
            record.clear()


@contextmanager
def scripted_chat(tokenizer: MistralLargeTokenizer) -> Iterator[ScriptedChat]:
    """Run such a server in a thread until the context ends."""
    port = free_port()
    chat = ScriptedChat(f"http://{HOST}:{port}")
    app = FastAPI()
    app.include_router(page_routes(tokenizer=tokenizer, model_name=MODEL, context=CONTEXT))

    async def complete(request: Request) -> Response:
        body = (await request.body()).decode()
        chat.bodies.append(body)
        chat.requests.append(json.loads(body))
        chat.authorizations.append(request.headers.get("authorization"))
        reply = chat.replies.pop(0)
        if reply.error is not None and reply.error[0] != 200:
            error = {"message": reply.error[1], "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": error}, reply.error[0])
        return StreamingResponse(_stream(chat, reply), media_type="text/event-stream")

    app.add_api_route("/v1/chat/completions", complete, methods=["POST"])
    server = uvicorn.Server(uvicorn.Config(app, HOST, port, log_level="critical"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield chat
    finally:
        server.should_exit = server.force_exit = True
        thread.join()


async def _stream(chat: ScriptedChat, reply: Reply) -> AsyncIterator[str]:
    finish_reason = reply.finish_reason or ("tool_calls" if reply.calls else "stop")
    try:
        yield _event({"role": "assistant", "content": ""})
        for piece in reply.pieces:
            await asyncio.sleep(reply.pause)
            yield _event({"content": piece})
        for index, (name, arguments) in enumerate(reply.calls):
            await asyncio.sleep(reply.pause)
            start = {"index": index, "id": f"call{index:05}", "type": "function"}
            yield _event({"tool_calls": [{**start, "function": {"name": name, "arguments": ""}}]})
            for character in arguments:
                yield _event({"tool_calls": [{"index": index, "function": {"arguments": character}}]})
        if reply.error is not None:
            yield f"data: {json.dumps({'error': {'message': reply.error[1]}})}\n\n"
            return
        yield _event({}, finish_reason)
        usage = {"prompt_tokens": 20, "completion_tokens": len(reply.pieces) + 1, "total_tokens": 0}
        yield f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"
    except (asyncio.CancelledError, GeneratorExit):
        chat.disconnects += 1
        raise


def _event(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    chunk = {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], "usage": None}
    return f"data: {json.dumps(chunk)}\n\n"
