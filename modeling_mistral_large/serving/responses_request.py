"""Requests of the Responses API, read strictly into what a chat completion is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from .chat_request import (
    MOST_TOP_LOGPROBS,
    SAMPLING,
    TEXT_LABELS,
    ChatRequest,
    check_messages,
    read_response_format,
    read_sampling,
    read_tool_choice,
)
from .json_fields import Fields, RequestError

# Parameters that this server does not have, and the values that ask for nothing; null always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": None}, {"effort": "none"}),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "stream_options": ({}, {"include_obfuscation": False}),
    "truncation": ("disabled",),
}
LOGPROBS = "message.output_text.logprobs"
# There is no reasoning, so that nothing of it is left out.
INCLUDED = (LOGPROBS, "reasoning.encrypted_content")
KNOWN = frozenset(
    {
        *NEUTRAL,
        *TEXT_LABELS,
        *SAMPLING,
        *("model", "input", "instructions", "tools", "tool_choice", "parallel_tool_calls", "text", "stream"),
        *("max_output_tokens", "metadata", "include", "top_logprobs"),
    }
)
TEXT_PARTS = ("input_text", "output_text", "text")


@dataclass(frozen=True)
class ResponseRequest:
    """A request of the Responses API: what is asked of the model, and what the response repeats of it."""

    chat: ChatRequest
    repeated: dict[str, Any]


def read_response_request(body: Mapping[str, Any]) -> ResponseRequest:
    """Read the JSON of a request.

    Raises:
        RequestError: a parameter that is unknown, of another type, out of its range, or that this server cannot obey.
    """
    given = Fields(body)
    given.check_names(KNOWN, NEUTRAL)
    for name in TEXT_LABELS:
        given.text(name)
    instructions = given.text("instructions")
    messages = _read_input(given)
    if instructions:
        messages.insert(0, {"role": "system", "content": instructions})
    check_messages(messages)
    tools = given.array("tools", "a list of tools") or []
    nested = Fields({"tools": [_nest(tool, f"tools[{index}]") for index, tool in enumerate(tools)]})
    nested.given |= {name: body[name] for name in ("tool_choice", "parallel_tool_calls") if body.get(name) is not None}
    if isinstance(choice := nested.given.get("tool_choice"), dict) and "name" in choice:
        nested.given["tool_choice"] = {"type": choice.get("type"), "function": {"name": choice["name"]}}
    chat = ChatRequest(
        model=given.text("model"),
        messages=messages,
        tool_choice=read_tool_choice(nested),
        response_format=_read_format(given),
        is_streamed=given.flag("stream"),
        max_tokens=given.whole("max_output_tokens", 1, 2**31),
        max_tokens_name="max_output_tokens",
        top_logprobs=_read_logprobs(given),
        sampling=read_sampling(given),
    )
    text = given.mapping("text") or {}
    repeated = {
        "instructions": instructions,
        "max_output_tokens": chat.max_tokens,
        "metadata": given.mapping("metadata") or {},
        "parallel_tool_calls": chat.tool_choice.is_parallel,
        "temperature": chat.sampling.get("temperature"),
        "text": {"format": text.get("format") or {"type": "text"}},
        "tool_choice": given.given.get("tool_choice", "auto"),
        "tools": [{"strict": False, **tool} for tool in tools],
        "top_p": chat.sampling.get("top_p"),
        "user": given.text("user"),
    }
    return ResponseRequest(chat, repeated)


def _read_input(given: Fields) -> list[Any]:
    value: Any = given.of_type("input", (str, list), "text or a list of items")
    if value is None:
        raise RequestError("input: missing; pass text or a list of items", "input")
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[Any] = []
    for index, item in enumerate(value):
        _add_item(messages, item, f"input[{index}]")
    return messages


def _add_item(messages: list[Any], item: Any, where: str) -> None:
    """Append an item as a message; calls belong to the assistant's message that they follow."""
    kind = item.get("type", "message") if isinstance(item, dict) else None
    if kind == "message":
        messages.append({"role": item.get("role"), "content": _read_content(item.get("content"), where)})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        if not isinstance(function["arguments"], str):
            _refuse(where, "arguments must be the JSON text of an object")
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append({"id": _read_call_id(item, where), "type": "function", "function": function})
    elif kind == "function_call_output":
        content = _read_content(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": _read_call_id(item, where), "content": content})
    else:
        _refuse(where, f"must be a message, a function_call or a function_call_output, and not {kind or 'this'}")


def _read_call_id(item: Mapping[str, Any], where: str) -> str:
    call_id = item.get("call_id")
    if not isinstance(call_id, str) or not call_id:
        _refuse(where, "call_id must be a string")
    return str(call_id)


def _read_content(content: Any, where: str) -> Any:
    """Return a content with the text parts of chat messages; what is none is the format's to refuse."""
    if not isinstance(content, list):
        return content
    parts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            _refuse(where, f"content[{number}] must be an input_text, as this model reads text only")
        parts.append({"type": "text", "text": part.get("text")})
    return parts


def _refuse(where: str, rule: str) -> NoReturn:
    raise RequestError(f"{where}: {rule}; correct it", "input")


def _nest(tool: Any, where: str) -> dict[str, Any]:
    """Return the tool of a chat completion that a flat one is."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise RequestError(f'{where}: must be of type "function", as this server has no others; leave it out', "tools")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}


def _read_format(given: Fields) -> dict[str, Any] | None:
    """Read `text.format`, whose schema a chat completion has one level further down."""
    text = Fields(given.mapping("text") or {}, "text")
    text.check_names({"format"}, {"verbosity": ()})
    form = text.mapping("format")
    if form is None:
        return None
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    try:
        return read_response_format(Fields({"response_format": form}))
    except RequestError as error:
        raise RequestError(
            'text.format: must be of type "text", "json_object" or "json_schema", the latter with a name and a schema; '
            "correct it",
            "text.format",
        ) from error


def _read_logprobs(given: Fields) -> int | None:
    included = given.array("include", "a list") or []
    for each in included:
        if each not in INCLUDED:
            raise RequestError(f"include: this server has no {each!r}; leave it out", "include")
    top = given.whole("top_logprobs", 0, MOST_TOP_LOGPROBS)
    return (top or 0) if top or LOGPROBS in included else None
