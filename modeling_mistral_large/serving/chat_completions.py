"""`POST /v1/chat/completions`: the JSON of responses and of the chunks of a stream."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from .completion_text import Delta
from .running import RunningCompletion, failure_of_stream


def completion_body(completion: RunningCompletion, choices: list[Delta]) -> dict[str, Any]:
    """Return a whole response."""
    return {
        **_head(completion, "chat.completion"),
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": _logprobs(completion, choice),
                "finish_reason": why,
            }
            for index, (choice, why) in enumerate(zip(choices, completion.finish_reasons, strict=True))
        ],
        "usage": completion.usage(),
    }


async def completion_events(completion: RunningCompletion) -> AsyncIterator[str]:
    """Yield the events of a streamed response."""
    head = _head(completion, "chat.completion.chunk")
    # Of a request that includes the usage, all chunks have the key.
    usage = {"usage": None} if completion.request.includes_usage else {}

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return event({**head, "choices": [choice], **usage})

    for index in range(completion.request.n):
        yield chunk(index, {"role": "assistant", "content": ""})
    calls = [0] * completion.request.n
    try:
        async for index, delta, finish_reason in completion.deltas():
            if delta.text or delta.logprobs:
                yield chunk(index, {"content": delta.text}, _logprobs(completion, delta))
            for call in delta.tool_calls:
                yield chunk(index, {"tool_calls": [{"index": calls[index], **_call(call)}]})
                calls[index] += 1
            if finish_reason is not None:
                yield chunk(index, {}, finish_reason=finish_reason)
    except Exception as error:
        yield event(failure_of_stream(error))
        return
    if completion.request.includes_usage:
        yield event({**head, "choices": [], "usage": completion.usage()})
    yield "data: [DONE]\n\n"


def event(body: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def _head(completion: RunningCompletion, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": completion.created,
        "model": completion.name,
        "system_fingerprint": None,
    }


def _message(choice: Delta) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message |= {"content": choice.text or None, "tool_calls": [_call(call) for call in choice.tool_calls]}
    return message


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call as the API has it: arguments are the JSON text of an object."""
    return {"id": call["id"], "type": "function", "function": call_function(call)}


def call_function(call: dict[str, Any]) -> dict[str, str]:
    """Return name and arguments of a tool call, the latter as JSON."""
    function = call["function"]
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"name": function["name"], "arguments": text}


def _logprobs(completion: RunningCompletion, delta: Delta) -> dict[str, Any] | None:
    if completion.request.top_logprobs is None:
        return None
    return {"content": delta.logprobs, "refusal": None}
