"""Reading of OpenAI-shaped messages and requests, every one in one plain form."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.formats import InstructFormat
from modeling_mistral_large.instruct.json_text import as_mapping, check_unicode, is_list, json_value, rewrite_json, show
from modeling_mistral_large.instruct.tool_call_ids import is_tool_call_id
from modeling_mistral_large.instruct.tool_schemas import FUNCTION_NAME, FUNCTION_NAME_RULE, read_function_name

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# What `tool` was called before there were several calls in a response.
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

# Settings of a request that would change its prompt, if these formats had a place for them.
REFUSED_SETTINGS = ("documents", "reasoning_effort", "truncate_for_context_length")


@dataclass(slots=True)
class ToolCall:
    name: str
    arguments: str  # JSON
    given_id: str | None
    is_id_written: bool = True


@dataclass(slots=True)
class Message:
    index: int
    role: str
    has_content: bool
    text: str = ""  # of a tool message: as the format writes results
    is_prefix: bool = False
    weight: int | None = None
    calls: Sequence[ToolCall] = field(default=())
    given_id: str | None = None

    @property
    def where(self) -> str:
        return f"message {self.index}"


def read_request(conversation: Any, tools: Any, form: InstructFormat) -> tuple[Sequence[Any], Any, bool]:
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
            raise ConversationError(
                f"{name} {show(fields[name])}: the {form.name} format has no place for it; leave it out"
            )
    own = fields.get("tools") or fields.get("functions")
    if own and tools:
        raise ConversationError("tools: the request has its own; a prompt has one list of them; leave one out")
    return messages, tools or own, bool(fields.get("continue_final_message"))


def read_message(given: Any, index: int, form: InstructFormat, *, strict: bool, is_sample_end: bool) -> Message:
    message = given if isinstance(given, dict) else as_mapping(given)
    if message is None:
        raise ConversationError(
            f"message {index}: {show(given)}; a message is a dict with a role and a content; pass one"
        )
    given_role = _value(message.get("role"))
    role = ROLES.get(given_role) if isinstance(given_role, str) else None
    if given_role == OLD_TOOL_ROLE and not strict:
        role = "tool"
    if role is None:
        raise ConversationError(
            f"message {index}: role {show(given_role)}; the roles are {', '.join(ROLES)}; choose one of them"
        )
    where = f"message {index}"
    if not KEYS[role].issuperset(message):
        _check_keys(message, KEYS[role], where, f"in {'an' if role == 'assistant' else 'a'} {role} message", form)
    content = message.get("content")
    if strict and content is None and role != "assistant":
        raise ConversationError(f"{where}: no content; a {role} message has text; pass a string")
    if role == "tool":
        read = Message(index, role, has_content=True)
        _read_tool_result(message, read, form, strict=strict)
        return read
    text = _read_text(content, where, form)
    read = Message(index, role, bool(content), text if text.isascii() else check_unicode(text, where))
    if message.get("name"):
        warnings.warn(
            "`name` of a message: the format has no place for it, and leaves it out as the reference does; "
            "write it into the content where the model should know who speaks",
            stacklevel=2,
        )
    if role == "assistant":
        _read_answer(message, read, form, strict=strict, is_sample_end=is_sample_end)
    return read


def _value(given: Any) -> Any:
    """Return what an enum's member stands for, or the value that is given."""
    return given.value if isinstance(given, Enum) else given


def _check_keys(fields: Mapping[Any, Any], known: frozenset[str], where: str, place: str, form: InstructFormat) -> None:
    """Check that keys without a place in the format say nothing."""
    for key, value in fields.items():
        is_empty = value is None or ((isinstance(value, str | Mapping) or is_list(value)) and len(value) == 0)
        if key in known or is_empty:
            continue
        # What another role may say, and this message does not.
        if value is False and key in KEYS["assistant"]:
            continue
        raise ConversationError(
            f"{where}: {key} {show(value)}; the {form.name} format has no such thing {place}; "
            "move what the model should read into the content, or leave the key out"
        )


def _read_text(content: Any, where: str, form: InstructFormat) -> str:
    """Return a text, or the texts of the chunks of one message."""
    if isinstance(content, str):
        return content if type(content) is str else str.__str__(content)
    if content is None:
        return ""
    if not is_list(content):
        raise ConversationError(
            f"{where}: content {show(content)}; it must be text or a list of text chunks; convert it"
        )
    return form.separator.join(
        filter(None, (_read_chunk(chunk, f"{where}: content[{n}]", form) for n, chunk in enumerate(content)))
    )


def _read_chunk(chunk: Any, where: str, form: InstructFormat) -> str:
    fields = as_mapping(chunk)
    kind = _value(fields.get("type")) if fields is not None else None
    if fields is None or kind != "text":
        raise ConversationError(
            f"{where} is {show(chunk if kind is None else kind)}; this model reads text chunks only; "
            'pass {"type": "text", "text": …} or leave it out'
        )
    text = fields.get("text")
    if not isinstance(text, str):
        raise ConversationError(f"{where}.text is {show(text)}; it must be a string; convert it")
    if not CHUNK_KEYS.issuperset(fields):
        _check_keys(fields, CHUNK_KEYS, where, "in a text chunk", form)
    return str.__str__(text)


def _read_answer(
    message: Mapping[str, Any], read: Message, form: InstructFormat, *, strict: bool, is_sample_end: bool
) -> None:
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
            raise ConversationError(
                f"{read.where}: {key}; the {form.name} format has no place for reasoning; leave the key out"
            )
    calls = message.get("tool_calls")
    if calls is not None and not is_list(calls):
        raise ConversationError(f"{read.where}: tool_calls {show(calls)}; it must be a list of calls; correct it")
    read.calls = [
        _read_call(call, f"{read.where}: tool_calls[{number}]", form, strict=strict, is_sample_end=is_sample_end)
        for number, call in enumerate(calls or ())
    ]
    if (old_call := message.get("function_call")) is None:
        return
    if strict or read.calls:
        raise ConversationError(
            f"{read.where}: function_call {show(old_call)}; calls are in tool_calls; move it there, or leave it out"
        )
    where = f"{read.where}: function_call"
    read.calls = [_read_call({"function": old_call}, where, form, strict=strict, is_sample_end=is_sample_end)]


def _read_call(call: Any, where: str, form: InstructFormat, *, strict: bool, is_sample_end: bool) -> ToolCall:
    fields = as_mapping(call) or {}
    function = as_mapping(fields.get("function"))
    if function is None:
        raise ConversationError(
            f'{where}: {show(call)}; a call is {{"id": …, "type": "function", "function": {{"name": …, '
            '"arguments": …}}; correct it'
        )
    kind = _value(fields.get("type", "function"))
    if kind != "function":
        raise ConversationError(f"{where}: type {show(kind)}; every call is of type 'function'; correct it")
    name = read_function_name(function, where)
    if not CALL_KEYS.issuperset(fields):
        _check_keys(fields, CALL_KEYS, where, "in a tool call", form)
    if not FUNCTION_KEYS.issuperset(function):
        _check_keys(function, FUNCTION_KEYS, f"{where} ({name})", "in a tool call", form)
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
    return ToolCall(str.__str__(name), _write_value(arguments, where, strict=strict), given_id)


def _read_tool_result(message: Mapping[str, Any], read: Message, form: InstructFormat, *, strict: bool) -> None:
    """Add what a tool message holds."""
    name = message.get("name")
    if name is not None and (not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name)):
        raise ConversationError(f"{read.where}: name {show(name)}; {FUNCTION_NAME_RULE}; correct it or leave it out")
    read.given_id = _read_id(message.get("tool_call_id"), read.where, strict=strict)
    content = message.get("content")
    if content is None or isinstance(content, str) or (is_list(content) and (strict or _are_chunks(content))):
        content = _read_text(content, read.where, form)
        if form.tool_content_token is not None:
            read.text = check_unicode(content, read.where)
            return
        content = content or "{}"
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
