"""`POST /v1/responses`: the JSON of responses and the typed events of a stream."""

import json
import uuid
from collections.abc import AsyncIterator
from typing import Any

from .chat_completions import call_function
from .completion_text import Delta
from .responses_request import ResponseRequest
from .running import RunningCompletion, failure_of_stream


def response_body(asked: ResponseRequest, completion: RunningCompletion, choices: list[Delta]) -> dict[str, Any]:
    """Return a whole response."""
    (choice,) = choices
    output = [_call_item(call) for call in choice.tool_calls]
    if choice.text or not output:
        has_logprobs = asked.chat.top_logprobs is not None
        output.insert(0, _message_item(choice.text, choice.logprobs if has_logprobs else []))
    return _response(asked, completion, f"resp_{uuid.uuid4().hex}", output)


def _response(
    asked: ResponseRequest, completion: RunningCompletion, response_id: str, output: list[Any]
) -> dict[str, Any]:
    """Return a response in the state that the completion is in."""
    (finish_reason,) = completion.finish_reasons
    status = {None: "in_progress", "length": "incomplete"}.get(finish_reason, "completed")
    usage = completion.usage()
    return {
        "id": response_id,
        "object": "response",
        "created_at": completion.created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "model": completion.name,
        "output": output,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
        **asked.repeated,
        "usage": None
        if finish_reason is None
        else {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {**usage["prompt_tokens_details"], "cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        },
    }


def _message_item(text: str, logprobs: list[Any], item_id: str | None = None) -> dict[str, Any]:
    return {
        "id": item_id or f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [_text_part(text, logprobs)],
    }


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call_item(call: dict[str, Any]) -> dict[str, Any]:
    function = call_function(call)
    ids = {"id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
    return {**ids, "type": "function_call", "status": "completed", **function}


class _Stream:
    """The events of one response: numbered, and each item opened, filled and closed before the next one."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []
        self._number = 0
        # Of the message that is open: its id, its text so far and its log probabilities.
        self._open: str | None = None
        self._text = ""
        self._logprobs: list[Any] = []

    def event(self, kind: str, **content: Any) -> str:
        """Return the next event."""
        body = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(body)}\n\n"

    def text(self, delta: Delta) -> list[str]:
        """Return the events of more text."""
        events = [] if self._open else self._begin_message()
        self._text += delta.text
        self._logprobs += delta.logprobs
        place = {"item_id": self._open, "output_index": len(self.output), "content_index": 0}
        return [
            *events,
            self.event("response.output_text.delta", **place, delta=delta.text, logprobs=delta.logprobs),
        ]

    def _begin_message(self) -> list[str]:
        self._open, self._text, self._logprobs = f"msg_{uuid.uuid4().hex}", "", []
        index = len(self.output)
        item = {**_message_item("", [], self._open), "status": "in_progress", "content": []}
        place = {"item_id": self._open, "output_index": index, "content_index": 0}
        return [
            self.event("response.output_item.added", output_index=index, item=item),
            self.event("response.content_part.added", **place, part=_text_part("", [])),
        ]

    def end_message(self, *, is_needed: bool = False) -> list[str]:
        """Return the events that close the message; with `is_needed`, of an empty one if there is no other item."""
        events = self._begin_message() if is_needed and not self._open and not self.output else []
        if not self._open:
            return events
        index = len(self.output)
        place = {"item_id": self._open, "output_index": index, "content_index": 0}
        item = _message_item(self._text, self._logprobs, self._open)
        self.output.append(item)
        self._open = None
        return [
            *events,
            self.event("response.output_text.done", **place, text=self._text, logprobs=self._logprobs),
            self.event("response.content_part.done", **place, part=item["content"][0]),
            self.event("response.output_item.done", output_index=index, item=item),
        ]

    def call(self, call: dict[str, Any]) -> list[str]:
        """Return the events of a tool call."""
        events = self.end_message()
        item = _call_item(call)
        index = len(self.output)
        place = {"item_id": item["id"], "output_index": index}
        self.output.append(item)
        begun = {**item, "status": "in_progress", "arguments": ""}
        return [
            *events,
            self.event("response.output_item.added", output_index=index, item=begun),
            self.event("response.function_call_arguments.delta", **place, delta=item["arguments"]),
            self.event(
                "response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"]
            ),
            self.event("response.output_item.done", output_index=index, item=item),
        ]


async def response_events(asked: ResponseRequest, completion: RunningCompletion) -> AsyncIterator[str]:
    """Yield the events of a streamed response."""
    stream = _Stream()
    response_id = f"resp_{uuid.uuid4().hex}"

    def response() -> dict[str, Any]:
        return _response(asked, completion, response_id, stream.output)

    yield stream.event("response.created", response=response())
    yield stream.event("response.in_progress", response=response())
    try:
        async for _, delta, _ in completion.deltas():
            events = stream.text(delta) if delta.text or delta.logprobs else []
            for call in delta.tool_calls:
                events += stream.call(call)
            for each in events:
                yield each
    except Exception as error:
        problem = failure_of_stream(error)["error"]
        code = problem["code"] or problem["type"]
        yield stream.event("error", code=code, message=problem["message"], param=problem["param"])
        return
    for each in stream.end_message(is_needed=True):
        yield each
    is_whole = completion.finish_reasons != ["length"]
    yield stream.event("response.completed" if is_whole else "response.incomplete", response=response())
