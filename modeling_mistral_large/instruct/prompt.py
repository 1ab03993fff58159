"""The v3 instruct format: a conversation becomes control tokens, and texts that are encoded one by one.

What the reference accepts gets exactly the reference's prompt. Where it refuses, `build_prompt` raises
ConversationError, except for what transformers users send every day; `strict=True` refuses that too:

| conversation                                                 | without `strict`                               |
| ------------------------------------------------------------ | ---------------------------------------------- |
| a tool call id that is not 9 letters or digits, or no id     | mapped, the same on the call and on its result |
| text next to tool calls in one answer                        | both kept: text, then calls                    |
| a final assistant message that is not to be continued        | rendered with `</s>`, as for training          |
| `content` that is null or absent beside a role that needs it | empty text                                     |
| a tool result that is any JSON value but text                | that JSON value                                |
| a tool call without `arguments`                              | `{}`                                           |
| `function_call`, and the role `function`                     | a tool call, and its result                    |
| a tool definition without its `{"type", "function"}` wrapper | wrapped                                        |

A final assistant message is a training sample: a tool call without an id in it has none in the prompt, as in the
reference's fine-tuning mode, and no token of a message with `weight: 0` counts as generated.

A conversation of system messages only, or one that begins with the assistant, gets an empty user message first, as
in the reference. A key that has no place in the format is refused unless it is empty or in METADATA. Messages, calls
and chunks may be objects (pydantic models, dataclasses). Nothing the caller passes in is changed.
"""

import json
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby, pairwise, zip_longest
from operator import attrgetter
from typing import Any, NamedTuple

from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.json_text import as_mapping, check_unicode, is_list, json_value, rewrite_json, show
from modeling_mistral_large.instruct.tool_call_ids import is_tool_call_id, map_tool_call_ids
from modeling_mistral_large.instruct.tool_schemas import (
    FUNCTION_NAME,
    FUNCTION_NAME_RULE,
    ToolDefinition,
    list_tools,
    write_tools,
)


class Segment(NamedTuple):
    """A part of a prompt: one control token, or a text that is encoded on its own and holds no control token.

    `is_generated` marks what the assistant says: its text, its tool calls and `</s>`, unless its weight is 0.
    """

    text: str
    is_control: bool = False
    is_generated: bool = False


BOS = Segment("<s>", is_control=True)
EOS = Segment("</s>", is_control=True, is_generated=True)
BEGIN_INST, END_INST = Segment("[INST]", is_control=True), Segment("[/INST]", is_control=True)
TOOL_CALLS = Segment("[TOOL_CALLS]", is_control=True, is_generated=True)
BEGIN_TOOLS, END_TOOLS = Segment("[AVAILABLE_TOOLS]", is_control=True), Segment("[/AVAILABLE_TOOLS]", is_control=True)
BEGIN_RESULTS, END_RESULTS = Segment("[TOOL_RESULTS]", is_control=True), Segment("[/TOOL_RESULTS]", is_control=True)

SEPARATOR = "\n\n"

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# What `tool` was called before there were several calls in an answer.
OLD_TOOL_ROLE = "function"

# What a message or a part of one says about itself, and not to the model. The reference leaves these out as well.
METADATA = frozenset({"cache_control", "created", "created_at", "id", "index", "metadata", "timestamp"})
# What is read of a message of each role. `name` is the reference's to check in a tool message, and its to leave out of
# all others.
_COMMON_KEYS = METADATA | {"role", "content", "name"}
KEYS = {
    "system": _COMMON_KEYS,
    "user": _COMMON_KEYS,
    "assistant": _COMMON_KEYS | {"tool_calls", "function_call", "prefix", "weight", "reasoning", "reasoning_content"},
    "tool": _COMMON_KEYS | {"tool_call_id"},
}
CHUNK_KEYS = METADATA | {"type", "text"}
CALL_KEYS = METADATA | {"type", "function"}
FUNCTION_KEYS = METADATA | {"name", "arguments"}

# Settings of a request that would change its prompt, if this format had a place for them.
REFUSED_SETTINGS = ("documents", "reasoning_effort", "truncate_for_context_length")

# What may come after a message of each role.
NEXT_ROLES = {
    "system": ("system", "user", "assistant"),
    "user": ("system", "user", "assistant"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("user", "assistant", "tool"),
}


@dataclass(slots=True)
class _ToolCall:
    name: str
    arguments: str  # JSON
    given_id: str | None
    is_id_written: bool = True


@dataclass(slots=True)
class _Message:
    index: int
    role: str
    has_content: bool
    text: str = ""  # of a tool message: JSON
    is_prefix: bool = False
    weight: int | None = None
    calls: Sequence[_ToolCall] = field(default=())
    given_id: str | None = None

    @property
    def where(self) -> str:
        return f"message {self.index}"


def build_prompt(
    messages: Any,
    tools: Sequence[ToolDefinition] | None = None,
    *,
    continue_final_message: bool = False,
    strict: bool = False,
    finetuning: bool = False,
) -> list[Segment]:
    """Return the prompt of an OpenAI-shaped conversation.

    messages: a list of dicts (or dataclasses, or pydantic models) with `role`, `content` (text or text chunks), and
        where they apply `tool_calls`, `tool_call_id`, `name`, `prefix` and `weight`; or a request with such `messages`,
        and `tools` of its own.
    tools: OpenAI tool definitions or Python functions.
    continue_final_message: leave `</s>` off the last message, which must be the assistant's; `prefix: true` in that
        message does the same.
    strict: refuse whatever the reference refuses.
    finetuning: the conversation is a training sample: refuse one that does not end with a complete assistant message,
        that has results without a call, or a call without an id anywhere else than in its last message.

    Raises ConversationError with the index of the message or tool, the finding, the rule and the way out.
    """
    messages, tools, is_continued = _read_request(messages, tools)
    continue_final_message = continue_final_message or is_continued
    tools = list_tools(tools)
    if len(messages) == 0:
        raise ConversationError("no messages: a conversation has at least one; pass a user message")
    final = len(messages) - 1
    conversation = [
        _read_message(message, index, strict=strict, is_sample_end=finetuning and index == final)
        for index, message in enumerate(messages)
    ]
    last = conversation[-1]
    if continue_final_message:
        if last.role != "assistant":
            raise ConversationError(
                f"{last.where}: its role is {last.role}; only an assistant message can be continued; "
                "leave continue_final_message out"
            )
        last.is_prefix = True
    _check_order(conversation)
    if finetuning:
        _check_sample(conversation)
    elif strict and last.role == "assistant" and not last.is_prefix:
        raise ConversationError(
            f"{last.where}: a final assistant message; a prompt ends with a user or tool message; "
            "pass continue_final_message=True to continue it, finetuning=True to train on it, or leave strict=True out"
        )
    _check_results(conversation)
    if not last.is_prefix:
        # There is no result that would have to name it; a model trained on an invented one would learn that.
        for call in last.calls:
            call.is_id_written = call.given_id is not None
    return _render(conversation, write_tools(tools, strict=strict) if tools else "", strict=strict)


# Reading: every message in one plain form


def _read_request(conversation: Any, tools: Any) -> tuple[Sequence[Any], Any, bool]:
    """Return the messages and tools of a request or a list of messages, and whether it continues the last one."""
    if is_list(conversation):
        return conversation, tools, False
    if isinstance(conversation, Mapping):
        fields = conversation
    else:
        # Read one by one, so that the messages stay what they are.
        names = ("messages", "tools", "functions", "continue_final_message", *REFUSED_SETTINGS)
        fields = {name: getattr(conversation, name) for name in names if hasattr(conversation, name)}
    messages = fields.get("messages")
    if not is_list(messages):
        raise ConversationError(
            f"messages {show(conversation)}: a conversation is a list of messages, even if there is one; pass [message]"
        )
    for name in REFUSED_SETTINGS:
        if fields.get(name):
            raise ConversationError(f"{name} {show(fields[name])}: the v3 format has no place for it; leave it out")
    own = fields.get("tools") or fields.get("functions")
    if own and tools:
        raise ConversationError("tools: the request has its own; a prompt has one list of them; leave one out")
    return messages, tools or own, bool(fields.get("continue_final_message"))


def _read_message(given: Any, index: int, *, strict: bool, is_sample_end: bool) -> _Message:
    message = given if isinstance(given, dict) else as_mapping(given)
    if message is None:
        raise ConversationError(
            f"message {index}: {show(given)}; a message is a dict with a role and a content; pass one"
        )
    given_role = message.get("role")
    if isinstance(given_role, Enum):
        given_role = given_role.value
    role = ROLES.get(given_role) if isinstance(given_role, str) else None
    if given_role == OLD_TOOL_ROLE and not strict:
        role = "tool"
    if role is None:
        raise ConversationError(
            f"message {index}: role {show(given_role)}; the roles are {', '.join(ROLES)}; choose one of them"
        )
    where = f"message {index}"
    if not KEYS[role].issuperset(message):
        _check_keys(message, KEYS[role], where, f"in {'an' if role == 'assistant' else 'a'} {role} message")
    content = message.get("content")
    if strict and content is None and role != "assistant":
        raise ConversationError(f"{where}: no content; a {role} message has text; pass a string")
    if role == "tool":
        read = _Message(index, role, has_content=True)
        _read_tool_result(message, read, strict=strict)
        return read
    text = _read_text(content, where)
    read = _Message(index, role, bool(content), text if text.isascii() else check_unicode(text, where))
    if message.get("name"):
        warnings.warn(
            "`name` of a message: the format has no place for it, and leaves it out as the reference does; "
            "write it into the content where the model should know who speaks",
            stacklevel=2,
        )
    if role == "assistant":
        _read_answer(message, read, strict=strict, is_sample_end=is_sample_end)
    return read


def _check_keys(fields: Mapping[Any, Any], known: frozenset[str], where: str, place: str) -> None:
    """Check that keys without a place in the format say nothing."""
    for key, value in fields.items():
        is_empty = value is None or ((isinstance(value, str | Mapping) or is_list(value)) and len(value) == 0)
        if key in known or is_empty:
            continue
        # What another role may say, and this message does not.
        if value is False and key in KEYS["assistant"]:
            continue
        raise ConversationError(
            f"{where}: {key} {show(value)}; the v3 format has no such thing {place}; "
            "move what the model should read into the content, or leave the key out"
        )


def _read_text(content: Any, where: str) -> str:
    """Return a text, or the texts of the chunks of one message."""
    if isinstance(content, str):
        return content if type(content) is str else str.__str__(content)
    if content is None:
        return ""
    if not is_list(content):
        raise ConversationError(
            f"{where}: content {show(content)}; it must be text or a list of text chunks; convert it"
        )
    return SEPARATOR.join(
        filter(None, (_read_chunk(chunk, f"{where}: content[{n}]") for n, chunk in enumerate(content)))
    )


def _read_chunk(chunk: Any, where: str) -> str:
    fields = as_mapping(chunk)
    kind = fields.get("type") if fields is not None else None
    if isinstance(kind, Enum):
        kind = kind.value
    if fields is None or kind != "text":
        raise ConversationError(
            f"{where} is {show(chunk if kind is None else kind)}; this model reads text chunks only; "
            'pass {"type": "text", "text": …} or leave it out'
        )
    text = fields.get("text")
    if not isinstance(text, str):
        raise ConversationError(f"{where}.text is {show(text)}; it must be a string; convert it")
    if not CHUNK_KEYS.issuperset(fields):
        _check_keys(fields, CHUNK_KEYS, where, "in a text chunk")
    return str.__str__(text)


def _read_answer(message: Mapping[str, Any], read: _Message, *, strict: bool, is_sample_end: bool) -> None:
    """Add what only an assistant message holds."""
    prefix = message.get("prefix")
    if prefix not in (None, False, True):
        raise ConversationError(f"{read.where}: prefix {show(prefix)}; it is true or false; correct it or leave it out")
    read.is_prefix = bool(prefix)
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise ConversationError(f"{read.where}: weight {show(weight)}; it is 0 or 1; correct it or leave it out")
    read.weight = weight
    for key in ("reasoning_content", "reasoning"):
        if message.get(key):
            raise ConversationError(f"{read.where}: {key}; the v3 format has no place for reasoning; leave the key out")
    calls = message.get("tool_calls")
    if calls is not None and not is_list(calls):
        raise ConversationError(f"{read.where}: tool_calls {show(calls)}; it must be a list of calls; correct it")
    read.calls = [
        _read_call(call, f"{read.where}: tool_calls[{number}]", strict=strict, is_sample_end=is_sample_end)
        for number, call in enumerate(calls or ())
    ]
    if (old_call := message.get("function_call")) is None:
        return
    if strict or read.calls:
        raise ConversationError(
            f"{read.where}: function_call {show(old_call)}; calls are in tool_calls; move it there, or leave it out"
        )
    read.calls = [
        _read_call({"function": old_call}, f"{read.where}: function_call", strict=strict, is_sample_end=is_sample_end)
    ]


def _read_call(call: Any, where: str, *, strict: bool, is_sample_end: bool) -> _ToolCall:
    fields = as_mapping(call) or {}
    function = as_mapping(fields.get("function"))
    if function is None:
        raise ConversationError(
            f'{where}: {show(call)}; a call is {{"id": …, "type": "function", "function": {{"name": …, '
            '"arguments": …}}; correct it'
        )
    kind = fields.get("type", "function")
    if isinstance(kind, Enum):
        kind = kind.value
    if kind != "function":
        raise ConversationError(f"{where}: type {show(kind)}; every call is of type 'function'; correct it")
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise ConversationError(f"{where}: name {show(name)}; {FUNCTION_NAME_RULE}; rename the function")
    if not CALL_KEYS.issuperset(fields):
        _check_keys(fields, CALL_KEYS, where, "in a tool call")
    if not FUNCTION_KEYS.issuperset(function):
        _check_keys(function, FUNCTION_KEYS, f"{where} ({name})", "in a tool call")
    if strict and "arguments" not in function:
        raise ConversationError(f"{where} ({name}): no arguments; a call has an object of arguments; pass {{}}")
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, str | Mapping):
        if (by_name := as_mapping(arguments)) is None or strict:
            raise ConversationError(
                f"{where} ({name}): arguments {show(arguments)}; they are an object or its JSON text; convert them"
            )
        arguments = by_name
    # The reference's own word for no id is "null".
    has_no_id = is_sample_end and fields.get("id", "null") == "null"
    given_id = None if has_no_id else _read_id(fields.get("id"), where, strict=strict)
    return _ToolCall(str.__str__(name), _write_value(arguments, where, strict=strict), given_id)


def _read_tool_result(message: Mapping[str, Any], read: _Message, *, strict: bool) -> None:
    """Add what a tool message holds."""
    name = message.get("name")
    if name is not None and (not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name)):
        raise ConversationError(f"{read.where}: name {show(name)}; {FUNCTION_NAME_RULE}; correct it or leave it out")
    read.given_id = _read_id(message.get("tool_call_id"), read.where, strict=strict)
    content = message.get("content")
    if content is None or isinstance(content, str) or (is_list(content) and (strict or _are_chunks(content))):
        content = _read_text(content, read.where) or "{}"
    elif strict:
        raise ConversationError(f"{read.where}: content {show(content)}; a tool result is text; pass it as JSON text")
    read.text = _write_value(content, read.where, strict=strict)


def _are_chunks(content: Sequence[Any]) -> bool:
    """Return whether a list is one of text chunks, empty or not, and not the list that a tool gave as its result."""
    items = map(as_mapping, content)
    return not content or any(isinstance(item, Mapping) and isinstance(item.get("type"), str) for item in items)


def _read_id(given: Any, where: str, *, strict: bool) -> str | None:
    if strict and not (isinstance(given, str) and is_tool_call_id(given)):
        raise ConversationError(
            f"{where}: tool call id {show(given)}; it must be 9 letters or digits; "
            "leave strict=True out to have it mapped"
        )
    # Some clients write "null" for an id they do not have.
    if not given or given == "null":
        return None
    return str.__str__(given) if isinstance(given, str) else str(given)


def _write_value(value: Any, where: str, *, strict: bool) -> str:
    """Return the JSON text of a value, or of a text that may hold one."""
    if not isinstance(value, str):

        def plain(inner: Any) -> Any:
            return dict(inner) if isinstance(inner, Mapping) else json_value(inner, where)

        try:
            # In ASCII first and from there, as the reference does: keys become text, and the last of equal ones counts.
            value = json.dumps(value, default=None if strict else plain)
        except ConversationError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise ConversationError(f"{where}: {error}; arguments and results are JSON values; convert them") from error
    return rewrite_json(value, where)


# Checking: what the reference refuses


def _check_order(conversation: Sequence[_Message]) -> None:
    first = conversation[0]
    if len(conversation) == 1 and first.role not in ("user", "system"):
        raise ConversationError(
            f"{first.where}: an {first.role} message alone; a conversation has a user or system message; add one"
        )
    for previous, message in pairwise(conversation):
        if message.role not in NEXT_ROLES[previous.role]:
            raise ConversationError(
                f"{message.where}: role {message.role} after {previous.role}; what comes there is "
                f"{', '.join(NEXT_ROLES[previous.role])}; move the message or change its role"
            )
        if previous.is_prefix:
            raise ConversationError(
                f"{previous.where}: prefix is true; only the last message can be continued; leave prefix out"
            )


def _check_sample(conversation: Sequence[_Message]) -> None:
    """Check what the reference asks of a conversation to train on."""
    last = conversation[-1]
    if last.role != "assistant" or last.is_prefix:
        problem = "a message to be continued" if last.is_prefix else f"its role is {last.role}"
        raise ConversationError(
            f"{last.where}: {problem}; a training sample ends with a complete assistant message; "
            "add one, or leave finetuning=True out"
        )
    for message in conversation[:-1]:
        for number, call in enumerate(message.calls):
            if call.given_id is None:
                raise ConversationError(
                    f"{message.where}: tool_calls[{number}] has no id; a model would learn an invented one; "
                    "give it and its result one of `new_tool_call_id`, or leave finetuning=True out"
                )


def _check_results(conversation: Sequence[_Message]) -> None:
    """Check that every tool call has its result before the next answer."""
    # The reference counts neither the calls nor the result of a first message.
    awaited = 0
    for message in conversation[1:]:
        if message.role == "tool":
            awaited -= 1
        elif message.role == "assistant":
            if awaited != 0:
                finding = "results are missing" if awaited > 0 else "results have no call"
                raise ConversationError(
                    f"{message.where}: {abs(awaited)} tool {finding} before it; every tool call has one tool message "
                    "before the next answer; add or remove tool messages"
                )
            awaited = len(message.calls)


def _check_answer(turn: Sequence[_Message], *, strict: bool) -> None:
    """Check that the assistant's messages in a row say something, and text before tool calls."""
    has_text = has_content = has_calls = False
    for message in turn:
        if not message.has_content and not message.calls:
            raise ConversationError(
                f"{message.where}: neither content nor tool_calls; an assistant message has one of them; leave it out"
            )
        if has_calls and message.text:
            raise ConversationError(
                f"{message.where}: text after tool calls; their results come before it; add tool messages"
            )
        has_text = has_text or bool(message.text)
        has_content = has_content or message.has_content
        has_calls = has_calls or bool(message.calls)
        if strict and has_content and has_calls:
            raise ConversationError(
                f"{message.where}: content and tool_calls; an answer has one; leave strict=True out to keep both"
            )
    if not has_text and not has_calls:
        raise ConversationError(f"{turn[0].where}: its text is empty; an assistant message has text; leave it out")


# Rendering: the checked conversation as segments


def _render(conversation: Sequence[_Message], tools: str, *, strict: bool) -> list[Segment]:
    ids = iter(_map_ids(conversation))
    system = SEPARATOR.join(
        message.text for message in conversation if message.role == "system" and message.has_content
    )
    turns = [
        (role, list(turn))
        # Messages that are trained on and messages that are not are answers of their own, as in the reference.
        for (role, _), turn in groupby(conversation, attrgetter("role", "weight"))
        # A system message has no place of its own, but keeps the users around it apart.
        if role != "system"
    ]
    if not turns or turns[0][0] != "user":
        turns.insert(0, ("user", []))
    last_user = max(number for number, (role, _) in enumerate(turns) if role == "user")

    segments = [BOS]
    for number, (role, turn) in enumerate(turns):
        if role == "user":
            text = SEPARATOR.join(message.text for message in turn if message.text)
            if number == last_user:
                if tools:
                    segments += [BEGIN_TOOLS, Segment(tools), END_TOOLS]
                if system:
                    text = system + SEPARATOR + text
            segments += [BEGIN_INST, Segment(text), END_INST]
        elif role == "assistant":
            _check_answer(turn, strict=strict)
            segments += _render_answer(turn, ids)
        else:
            for message in turn:
                result = f'{{"content": {message.text}, "call_id": {json.dumps(next(ids))}}}'
                segments += [BEGIN_RESULTS, Segment(result), END_RESULTS]
    return segments


def _render_answer(turn: Sequence[_Message], ids: Iterator[str]) -> list[Segment]:
    segments = []
    if text := SEPARATOR.join(message.text for message in turn if message.text):
        segments.append(Segment(text.rstrip(" "), is_generated=True))
    if calls := [call for message in turn for call in message.calls]:
        texts = [_write_call(call, next(ids)) for call in calls]
        segments += [TOOL_CALLS, Segment(f"[{', '.join(texts)}]", is_generated=True)]
    if not turn[-1].is_prefix:
        segments.append(EOS)
    return [segment._replace(is_generated=False) for segment in segments] if turn[0].weight == 0 else segments


def _write_call(call: _ToolCall, call_id: str) -> str:
    end = f', "id": {json.dumps(call_id)}}}' if call.is_id_written else "}"
    return f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}{end}'


def _map_ids(conversation: Sequence[_Message]) -> list[str]:
    """Return the id of every call and result, in the order of the prompt.

    A call without an id has that of the result in its place, a result without one that of the call in its place.
    """
    given: list[Hashable] = []
    calls: list[Hashable] = []
    place = 0
    for number, message in enumerate(conversation):
        if message.role == "assistant":
            following = conversation[number + 1 : number + 1 + len(message.calls)]
            calls, place = _call_ids(number, message.calls, following), 0
            given += calls
        elif message.role == "tool":
            in_place = calls[place] if place < len(calls) else (number, None)
            given.append(message.given_id or in_place)
            place += 1
    mapped = map_tool_call_ids(given)
    return [mapped[key] for key in given]


def _call_ids(number: int, calls: Sequence[_ToolCall], following: Sequence[_Message]) -> list[Hashable]:
    """Return the ids the caller gave to the calls of message `number`, and what stands for one that is nowhere."""
    own = [call.given_id for call in calls]
    known = set(own)
    results = [message.given_id for message in following]
    return [
        call_id or (result_id if result_id not in known else None) or (number, place)
        for place, (call_id, result_id) in enumerate(zip_longest(own, results))
    ]
