"""Prompts: a conversation becomes control tokens, and texts that are encoded one by one.

The two instruct formats, v3 of Mistral-Large-Instruct-2407 and v7 of Mistral-Large-Instruct-2411, differ in what
`instruct.formats` says. What the reference of a format accepts gets exactly the reference's prompt. Where it refuses,
`build_prompt` raises ConversationError, except for what transformers users send every day; `strict=True` refuses that
too:

| conversation                                                 | without `strict`                               |
| ------------------------------------------------------------ | ---------------------------------------------- |
| a tool call id that is not 9 letters or digits, or no id     | mapped, the same on the call and on its result |
| v3: text next to tool calls in one response                  | both kept: text, then calls                    |
| a final assistant message that is not to be continued        | rendered with `</s>`, as for training          |
| `content` that is null or absent where a role needs it       | empty text                                     |
| a tool result that is any JSON value but text                | that JSON value; in v7 its JSON text           |
| a tool call without `arguments`                              | `{}`                                           |
| `function_call`, and the role `function`                     | a tool call, and its result                    |
| a tool definition without its `{"type", "function"}` wrapper | wrapped                                        |

A final assistant message is a training sample: a tool call without an id in it has none in the prompt, as in the
reference's fine-tuning mode, and no token of a message with `weight: 0` counts as generated.

As in the references, a conversation of system messages only, or one that begins with the assistant, gets an empty user
message first in v3 and none in v7. Tools go before the last user message, so a v7 conversation without one drops them,
as its reference does; a warning says so. A key that has no place in the format is refused unless it is empty or in
METADATA. Messages, calls and chunks may be objects (pydantic models, dataclasses). Nothing the caller passes in is
changed.
"""

import json
import warnings
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby, pairwise, zip_longest
from operator import attrgetter
from typing import Any, NamedTuple

from mistral_large_conversion.prompt_roles import html_prompt
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.formats import InstructFormat, find_format
from modeling_mistral_large.instruct.messages import Message, ToolCall, read_message, read_request
from modeling_mistral_large.instruct.tool_call_ids import map_tool_call_ids
from modeling_mistral_large.instruct.tool_schemas import ToolDefinition, list_tools, write_tools


class Segment(NamedTuple):
    """A segment of a prompt: one control token, or a text that is encoded on its own and holds no control token.

    `is_generated` marks assistant tokens: its text, its tool calls and `</s>`, unless its weight is 0.
    """

    text: str
    is_control: bool = False
    is_generated: bool = False


class Prompt(list[Segment]):
    """The segments of a prompt; a notebook shows them as `mistral-large show` does."""

    def _repr_html_(self) -> str:
        return html_prompt((segment.text, segment.is_control) for segment in self)


BOS = Segment("<s>", is_control=True)
EOS = Segment("</s>", is_control=True, is_generated=True)
BEGIN_INST, END_INST = Segment("[INST]", is_control=True), Segment("[/INST]", is_control=True)
TOOL_CALLS = Segment("[TOOL_CALLS]", is_control=True, is_generated=True)
BEGIN_TOOLS, END_TOOLS = Segment("[AVAILABLE_TOOLS]", is_control=True), Segment("[/AVAILABLE_TOOLS]", is_control=True)
BEGIN_RESULTS, END_RESULTS = Segment("[TOOL_RESULTS]", is_control=True), Segment("[/TOOL_RESULTS]", is_control=True)


def build_prompt(
    messages: Any,
    tools: Sequence[ToolDefinition] | None = None,
    *,
    prompt_format: str = "v3",
    continue_final_message: bool = False,
    strict: bool = False,
    finetuning: bool = False,
) -> Prompt:
    """Return the prompt of an OpenAI-shaped conversation.

    messages: a list of dicts (or dataclasses, or pydantic models) with `role`, `content` (text or text chunks), and
        where they apply `tool_calls`, `tool_call_id`, `name`, `prefix` and `weight`; or a request with such `messages`,
        and `tools` of its own.
    tools: OpenAI tool definitions or Python functions.
    prompt_format: the instruct format, a name in `FORMATS`: `v3` of the 2407 model, or `v7` of the 2411 model.
        `MistralLargeTokenizer.prompt_format` says which one a checkpoint has.
    continue_final_message: leave `</s>` off the last message, which must be the assistant's; `prefix: true` in that
        message does the same.
    strict: refuse whatever the reference refuses.
    finetuning: the conversation is a training sample: refuse one that does not end with a complete assistant message,
        that has results without a call, or a call without an id anywhere else than in its last message.

    Raises ConversationError with the index of the message or tool, the problem, the rule and the way out.
    """
    form = find_format(prompt_format)
    messages, tools, is_continued = read_request(messages, tools, form)
    continue_final_message = continue_final_message or is_continued
    tools = list_tools(tools)
    if len(messages) == 0:
        raise ConversationError("no messages: a conversation has at least one; pass a user message")
    final = len(messages) - 1
    conversation = [
        read_message(message, index, form, strict=strict, is_sample_end=finetuning and index == final)
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
    _check_order(conversation, form)
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
    written_tools = write_tools(tools, strict=strict) if tools else ""
    segments = _render(conversation, written_tools, form, strict=strict)
    if written_tools and BEGIN_TOOLS not in segments:
        warnings.warn(
            f"tools: the {form.name} format writes them before the last user message, and this conversation has none; "
            "they are left out, as the reference does it; add a user message",
            stacklevel=2,
        )
    return Prompt(segments)


# Checking: what the reference refuses


def _check_order(conversation: Sequence[Message], form: InstructFormat) -> None:
    first = conversation[0]
    if len(conversation) == 1 and first.role not in ("user", "system"):
        raise ConversationError(
            f"{first.where}: the only message, and its role is {first.role}; a conversation has a user or system "
            "message; add one"
        )
    for previous, message in pairwise(conversation):
        if message.role not in form.next_roles[previous.role]:
            raise ConversationError(
                f"{message.where}: role {message.role} after {previous.role}; what comes there is "
                f"{', '.join(form.next_roles[previous.role])}; move the message or change its role"
            )
        if previous.is_prefix:
            raise ConversationError(
                f"{previous.where}: prefix is true; only the last message can be continued; leave prefix out"
            )


def _check_sample(conversation: Sequence[Message]) -> None:
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


def _check_results(conversation: Sequence[Message]) -> None:
    """Check that every tool call has its result before the next response."""
    # The reference counts neither the calls nor the result of a first message.
    awaited = 0
    for message in conversation[1:]:
        if message.role == "tool":
            awaited -= 1
        elif message.role == "assistant":
            if awaited != 0:
                problem = "tool results missing" if awaited > 0 else "tool results without a call"
                raise ConversationError(
                    f"{message.where}: {problem} before it: {abs(awaited)}; every tool call has one tool message "
                    "before the next response; add or remove tool messages"
                )
            awaited = len(message.calls)


def _check_answer(turn: Sequence[Message], form: InstructFormat, *, strict: bool) -> None:
    """Check that the assistant's messages in a row say something, and text before tool calls."""
    has_text = has_content = has_calls = False
    for message in turn:
        # Where text and calls go together, the reference looks at them after the messages are merged.
        if not form.takes_text_with_calls:
            if not message.has_content and not message.calls:
                raise ConversationError(
                    f"{message.where}: neither content nor tool_calls; an assistant message has text or tool calls; "
                    "leave it out"
                )
            if has_calls and message.text:
                raise ConversationError(
                    f"{message.where}: text after tool calls; their results come before it; add tool messages"
                )
        has_text = has_text or bool(message.text)
        has_content = has_content or message.has_content
        has_calls = has_calls or bool(message.calls)
        if strict and not form.takes_text_with_calls and has_content and has_calls:
            raise ConversationError(
                f"{message.where}: content and tool_calls; a response has one; leave strict=True out to keep both"
            )
    if not has_text and not has_calls:
        problem = "its text is empty" if has_content else "neither content nor tool_calls"
        raise ConversationError(
            f"{turn[0].where}: {problem}; an assistant message has text or tool calls; leave it out"
        )


# Rendering: the checked conversation as segments


def _render(conversation: Sequence[Message], tools: str, form: InstructFormat, *, strict: bool) -> list[Segment]:
    ids = iter(_map_ids(conversation))
    turns = [
        (role, list(turn))
        # Messages that are trained on and messages that are not are responses of their own, as in the reference.
        for (role, _), turn in groupby(conversation, attrgetter("role", "weight"))
    ]
    system = ""
    if form.system_tokens is None:
        # They have no place of their own, but keep the users around them apart.
        said = (message.text for message in conversation if message.role == "system" and message.has_content)
        if system := form.separator.join(said):
            system += form.separator
        turns = [turn for turn in turns if turn[0] != "system"]
    if form.begins_with_user and (not turns or turns[0][0] != "user"):
        turns.insert(0, ("user", []))
    last_user = max((number for number, (role, _) in enumerate(turns) if role == "user"), default=None)

    segments = [BOS]
    for number, (role, turn) in enumerate(turns):
        if role == "user":
            if number == last_user and tools:
                segments += [BEGIN_TOOLS, Segment(tools), END_TOOLS]
            text = (system if number == last_user else "") + _merge_texts(turn, form)
            segments += [BEGIN_INST, Segment(text), END_INST]
        elif role == "assistant":
            _check_answer(turn, form, strict=strict)
            segments += _render_answer(turn, ids, form)
        elif role == "tool":
            for message in turn:
                segments += [BEGIN_RESULTS, *_render_result(message, next(ids), form), END_RESULTS]
        else:
            assert form.system_tokens is not None
            begin, end = (Segment(token, is_control=True) for token in form.system_tokens)
            for message in turn:
                segments += [begin, Segment(message.text), end]
    return segments


def _merge_texts(turn: Sequence[Message], form: InstructFormat) -> str:
    return form.separator.join(message.text for message in turn if message.text)


def _render_answer(turn: Sequence[Message], ids: Iterator[str], form: InstructFormat) -> list[Segment]:
    segments = []
    if text := _merge_texts(turn, form):
        segments.append(Segment(text.rstrip(form.stripped), is_generated=True))
    if calls := [call for message in turn for call in message.calls]:
        texts = [_write_call(call, next(ids)) for call in calls]
        segments += [TOOL_CALLS, Segment(f"[{', '.join(texts)}]", is_generated=True)]
    if not turn[-1].is_prefix:
        segments.append(EOS)
    return [segment._replace(is_generated=False) for segment in segments] if turn[0].weight == 0 else segments


def _render_result(message: Message, call_id: str, form: InstructFormat) -> list[Segment]:
    if form.tool_content_token is None:
        return [Segment(f'{{"content": {message.text}, "call_id": {json.dumps(call_id)}}}')]
    return [Segment(call_id), Segment(form.tool_content_token, is_control=True), Segment(message.text)]


def _write_call(call: ToolCall, call_id: str) -> str:
    end = f', "id": {json.dumps(call_id)}}}' if call.is_id_written else "}"
    return f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}{end}'


def _map_ids(conversation: Sequence[Message]) -> list[str]:
    """Return the id of every call and result, in the order of the prompt.

    A tool call without an id takes the id of the result at the same position, and vice versa.
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


def _call_ids(number: int, calls: Sequence[ToolCall], following: Sequence[Message]) -> list[Hashable]:
    """Return the ids the caller gave to the calls of message `number`, and what stands for one that is nowhere."""
    own = [call.given_id for call in calls]
    known = set(own)
    results = [message.given_id for message in following]
    return [
        call_id or (result_id if result_id not in known else None) or (number, place)
        for place, (call_id, result_id) in enumerate(zip_longest(own, results))
    ]
