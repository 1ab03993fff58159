"""Prompts against the reference: the same ids where it accepts, a refusal where it refuses, choices where we say so.

MISTRAL_LARGE_CONVERSATIONS=100000 pytest -n 2 tests/test_chat_prompts.py compares that many conversations.
"""

import copy
import json
import os
import re
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct import Segment, build_prompt

from .conversations import KINDS, ODD_TOOLS, Conversation, Kind, conversations, invalid_conversations, reference_ids

Reference = MistralTokenizer[Any, Any, Any, Any, Any]
Message = dict[str, Any]

CONVERSATIONS = int(os.environ.get("MISTRAL_LARGE_CONVERSATIONS", "1200"))
BATCHES = 4


def user(content: Any = "hi") -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any = "yes", **rest: Any) -> Message:
    return {"role": "assistant", "content": content, **rest}


def call(call_id: Any = "abcdefghi", name: Any = "f", arguments: Any = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*ids: Any) -> Message:
    return assistant(None, tool_calls=[call(call_id) for call_id in ids])


def result(call_id: Any = "abcdefghi", content: Any = "22") -> Message:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def our_ids(tokenizer: MistralLargeTokenizer, conversation: Conversation, **options: Any) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        continue_final_message=conversation.continue_final_message,
        return_dict=False,
        **options,
    )
    return ids


def prompt_ids(messages: list[Message]) -> tuple[list[str], list[str]]:
    """Return the ids of the calls and of the results in a prompt."""
    texts = [segment.text for segment in build_prompt(messages)]
    called = [json.loads(text) for mark, text in pairwise(texts) if mark == "[TOOL_CALLS]"]
    answered = [json.loads(text) for mark, text in pairwise(texts) if mark == "[TOOL_RESULTS]"]
    return [item["id"] for item in chain.from_iterable(called)], [item["call_id"] for item in answered]


# The reference's ids


@pytest.mark.parametrize("batch", range(BATCHES))
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_references(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, kind: Kind, batch: int
) -> None:
    for conversation in conversations(kind, seed=batch, count=CONVERSATIONS // (len(KINDS) * BATCHES)):
        assert our_ids(tokenizer, conversation) == reference_ids(reference_tokenizer, conversation), conversation


@pytest.mark.parametrize("kind", KINDS)
def test_strict_accepts_what_the_reference_accepts(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, kind: Kind
) -> None:
    for conversation in conversations(kind, seed=11, count=40):
        expected = reference_ids(reference_tokenizer, conversation)
        assert our_ids(tokenizer, conversation, strict=True) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_final_answer_is_what_the_reference_trains_on(
    tokenizer: MistralLargeTokenizer, tokenizer_model_file: Path, kind: Kind
) -> None:
    reference: Reference = MistralTokenizer.from_file(tokenizer_model_file, mode=ValidationMode.finetuning)
    compared = 0
    for conversation in conversations(kind, seed=12, count=60):
        if conversation.messages[-1]["role"] == "assistant":
            continue
        for answer in (assistant("done  "), calls("ABCDEFGHI", "123456789")):
            finished = Conversation([*conversation.messages, answer], conversation.tools)
            try:
                expected = reference_ids(reference, finished)
            # Calls without results, and results without calls, are not for training.
            except (MistralCommonException, ValueError):
                continue
            compared += 1
            assert our_ids(tokenizer, finished) == expected
    assert compared > 30


@pytest.mark.parametrize("kind", ["plain", "nasty"])
def test_a_rendered_prompt_encodes_to_the_same_ids(tokenizer: MistralLargeTokenizer, kind: Kind) -> None:
    for conversation in conversations(kind, seed=13, count=60):
        text = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            continue_final_message=conversation.continue_final_message,
            tokenize=False,
        )
        assert tokenizer.encode(text, add_special_tokens=False) == our_ids(tokenizer, conversation)


def test_a_batch_is_the_same_as_one_by_one(tokenizer: MistralLargeTokenizer) -> None:
    drawn = [conversation.messages for conversation in conversations("nasty", seed=14, count=20)]
    assert tokenizer.apply_chat_template(drawn, return_dict=False) == [
        tokenizer.apply_chat_template(messages, return_dict=False) for messages in drawn
    ]


def test_the_assistant_mask_is_what_the_assistant_says(tokenizer: MistralLargeTokenizer) -> None:
    messages = [
        user(),
        assistant("One. "),
        assistant("Two."),
        user(),
        calls("abcdefghi"),
        result(),
        assistant("Three."),
    ]
    output = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    said = [index for index, is_said in zip(output["input_ids"], output["assistant_masks"], strict=True) if is_said]
    assert tokenizer.decode(said) == (
        'One. \n\nTwo.</s>[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]</s> Three.</s>'
    )


def test_the_callers_data_stays_as_it_is(tokenizer: MistralLargeTokenizer) -> None:
    for conversation in chain(
        conversations("nasty", seed=15, count=50),
        [
            Conversation(
                [user([{"type": "text", "text": "a"}]), calls(None, "call_1"), result(None), result("call_1", {})]
            )
        ],
    ):
        before = copy.deepcopy(conversation)
        our_ids(tokenizer, conversation)
        assert repr(conversation) == repr(before)


def test_python_functions_are_tools(tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference) -> None:
    def get_current_weather(location: str, days: int = 1) -> str:
        """
        Get the current <weather> — °C

        Args:
            location: The city
            days: How many days (choices: [1, 7])

        Returns:
            The weather
        """
        return f"{location} {days}"

    properties = {
        "location": {"type": "string", "description": "The city"},
        "days": {"type": "integer", "enum": [1, 7], "description": "How many days"},
    }
    parameters = {"type": "object", "properties": properties, "required": ["location"]}
    tool = {"name": "get_current_weather", "description": "Get the current <weather> — °C", "parameters": parameters}
    expected = reference_ids(reference_tokenizer, Conversation([user()], [{"type": "function", "function": tool}]))
    assert our_ids(tokenizer, Conversation([user()], [get_current_weather])) == expected  # type: ignore[list-item]
    assert our_ids(tokenizer, Conversation([user()], [tool])) == expected


def test_messages_may_be_mappings_dataclasses_and_pydantic_models() -> None:
    @dataclass
    class Said:
        role: str
        content: str

    expected = build_prompt([user("a"), assistant("b"), user("c")])
    assert build_prompt([Said("user", "a"), Said("assistant", "b"), Said("user", "c")]) == expected
    assert build_prompt([MappingProxyType(message) for message in (user("a"), assistant("b"), user("c"))]) == expected
    native = [UserMessage(content="a"), AssistantMessage(content="b"), UserMessage(content="c")]
    assert build_prompt(native) == expected


def test_unknown_keys_are_ignored(tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference) -> None:
    odd = {"prefix": True, "tool_calls": 7, "tool_call_id": "x", "reasoning": "hm", "name": "a b", "weight": 0}
    messages = [{"role": "system", "content": "s", **odd}, {**user(), **odd}, user()]
    expected = reference_ids(reference_tokenizer, Conversation(messages))
    assert our_ids(tokenizer, Conversation(messages)) == expected


def test_errors_quote_the_beginning_of_long_values() -> None:
    with pytest.raises(ConversationError) as refusal:
        build_prompt([user({"x": "y" * 10_000})])
    assert len(str(refusal.value)) < 300


# Refusals


@pytest.mark.parametrize("kind", KINDS)
def test_we_refuse_what_the_reference_refuses(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, kind: Kind
) -> None:
    refused = 0
    for conversation in invalid_conversations(kind, seed=1, count=400):
        try:
            expected = reference_ids(reference_tokenizer, conversation)
        # pydantic, jsonschema, SentencePiece and plain Python all have their say.
        except Exception:
            refused += 1
            with pytest.raises(ConversationError, match=r"^(message \d+|tool \d+|no messages)"):
                our_ids(tokenizer, conversation, strict=True)
        else:
            assert our_ids(tokenizer, conversation, strict=True) == expected, conversation
            assert our_ids(tokenizer, conversation) == expected, conversation
    assert refused > 100


@pytest.mark.parametrize("tool", ODD_TOOLS, ids=str)
def test_we_refuse_the_tools_the_reference_refuses(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, tool: dict[str, Any]
) -> None:
    conversation = Conversation([user()], [tool])
    try:
        expected = reference_ids(reference_tokenizer, conversation)
    except Exception:
        with pytest.raises(ConversationError, match="tool 0"):
            our_ids(tokenizer, conversation, strict=True)
    else:
        assert our_ids(tokenizer, conversation, strict=True) == expected


REFUSED: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "no messages"),
    "no message": (["hi"], "message 0: 'hi'; a message is a dict"),
    "no role": ([{"content": "hi"}], "message 0: role None"),
    "unknown role": ([user(), {"role": "function", "content": "x"}], "message 1: role 'function'"),
    "list as a role": ([{"role": [], "content": "x"}], r"message 0: role \[\]"),
    "assistant alone": ([assistant()], "message 0: an assistant message alone"),
    "tool alone": ([result()], "message 0: an? tool message alone"),
    "tool after user": ([user(), result()], "message 1: role tool after user"),
    "tool after system": ([{"role": "system", "content": "s"}, result(), user()], "message 1: role tool after system"),
    "system after assistant": (
        [user(), assistant(), {"role": "system", "content": "s"}],
        "message 2: role system after",
    ),
    "system after tool": (
        [user(), calls("a"), result(), {"role": "developer", "content": "s"}],
        "message 3: role system",
    ),
    "prefix in the middle": ([user(), assistant(prefix=True), user()], "message 1: prefix is true"),
    "prefix of another type": ([user(), assistant(prefix="yes")], "message 1: prefix 'yes'"),
    "empty answer": ([user(), assistant("")], "message 1: neither content nor tool_calls"),
    "no answer": ([user(), {"role": "assistant"}, user()], "message 1: neither content nor tool_calls"),
    "answer of empty chunks": ([user(), assistant([{"type": "text", "text": ""}])], "message 1: its text is empty"),
    "missing result": ([user(), calls("a", "b"), result("a"), assistant()], "message 3: 1 tool results are missing"),
    "missing call": (
        [user(), calls("a"), result("a"), result("b"), assistant()],
        "message 4: 1 tool results have no call",
    ),
    "text after calls": ([calls("a"), assistant(), user()], "message 1: text after tool calls"),
    "number as content": ([user(7)], "message 0: content 7"),
    "image": ([user([{"type": "image_url", "image_url": "x"}])], r"message 0: content\[0\] is 'image_url'"),
    "text as a chunk": ([user(["hi"])], r"message 0: content\[0\] is 'hi'"),
    "chunk without text": ([user([{"type": "text"}])], r"message 0: content\[0\].text is None"),
    "reasoning": ([user(), assistant(reasoning_content="hm")], "message 1: reasoning_content"),
    "calls of another type": ([user(), assistant(None, tool_calls={})], r"message 1: tool_calls \{\}"),
    "no call": ([user(), assistant(None, tool_calls=[None])], r"message 1: tool_calls\[0\]: None"),
    "call without a function": ([user(), assistant(None, tool_calls=[{"id": "a"}])], r"message 1: tool_calls\[0\]: \{"),
    "call of another type": (
        [user(), assistant(None, tool_calls=[{**call(), "type": "retrieval"}])],
        r"message 1: tool_calls\[0\]: type 'retrieval'",
    ),
    "name of a call": (
        [user(), assistant(None, tool_calls=[call(name="a b")])],
        r"message 1: tool_calls\[0\]: name 'a b'",
    ),
    "arguments as a list": (
        [user(), assistant(None, tool_calls=[call(arguments=[])])],
        r"message 1: tool_calls\[0\] \(f\): arguments \[\]",
    ),
    "arguments that are no JSON": (
        [user(), assistant(None, tool_calls=[call(arguments={"a": {1}})])],
        r"message 1: tool_calls\[0\]: Object of type set",
    ),
    "name of a result": ([user(), calls("a"), {**result("a"), "name": "a b"}], "message 2: name 'a b'"),
    "digits without end": ([user(), calls("a"), result("a", "1" * 5000)], "message 2: Exceeds the limit"),
    "brackets without end": ([user(), calls("a"), result("a", "[" * 100_000)], "message 2: maximum recursion depth"),
    "surrogate": ([user(), assistant("x\ud800")], r"message 1: lone surrogate '\\ud800' at character 1"),
    "surrogate in JSON": ([user(), calls("a"), result("a", '"\\udc00"')], "message 2: lone surrogate"),
}


@pytest.mark.parametrize(("messages", "finding"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_names_the_message(messages: list[Any], finding: str) -> None:
    with pytest.raises(ConversationError, match=finding) as refusal:
        build_prompt(messages)
    # The finding, the rule and the way out.
    assert str(refusal.value).count(";") + str(refusal.value).count(":") >= 2


def test_only_an_assistant_message_can_be_continued() -> None:
    with pytest.raises(ConversationError, match="message 0: its role is user; only an assistant message"):
        build_prompt([user()], continue_final_message=True)


def deep_schema(levels: int, schema: Any = True) -> Any:
    for _ in range(levels):
        schema = {"not": schema}
    return schema


REFUSED_TOOLS: dict[str, tuple[Any, str]] = {
    "no tool": (7, "tool 0: 7; pass an OpenAI tool definition"),
    "another type": ({"type": "retrieval", "function": {"name": "f"}}, "tool 0: type 'retrieval'"),
    "no function": ({"function": "f"}, 'tool 0: no "function"'),
    "no name": ({"function": {}}, "tool 0: name None"),
    "name": ({"function": {"name": "a b"}}, "tool 0: name 'a b'"),
    "description": ({"function": {"name": "f", "description": 7}}, r"tool 0 \(f\): description 7"),
    "parameters": ({"function": {"name": "f", "parameters": []}}, r"tool 0 \(f\): parameters \[\]"),
    "schema": (
        {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}},
        r"tool 0 \(f\): parameters.properties.a.type is 'text' and must be one or several of array,",
    ),
    "schema in a list": (
        {"function": {"name": "f", "parameters": {"anyOf": [{}, {"minLength": -1}]}}},
        r"parameters.anyOf\[1\].minLength is -1",
    ),
    "no JSON": ({"function": {"name": "f", "parameters": {"default": {1}}}}, "tool 0: Object of type set"),
    "surrogate": ({"function": {"name": "f", "description": "\ud800"}}, "tool 0: lone surrogate"),
    "schema that says the same twice": (
        {"function": {"name": "f", "parameters": {"required": ["a", "a"]}}},
        r"parameters.required is \['a', 'a'\] and must be a list of different names",
    ),
    "pattern": (
        {"function": {"name": "f", "parameters": {"patternProperties": {"(": {}}}}},
        r"parameters.patternProperties is '\(' and must be a regular expression",
    ),
    "levels without end": (
        {"function": {"name": "f", "parameters": deep_schema(5000)}},
        "tool 0: maximum recursion depth",
    ),
    "error at the bottom": (
        {"function": {"name": "f", "parameters": deep_schema(100, {"type": "text"})}},
        r"not\.not\.type is 'text' and must be one or several",
    ),
    "function without docstring": (lambda x: x, "tool 0: .*docstring"),
    "class": (Conversation, "tool 0: .*docstring"),
}


@pytest.mark.parametrize(("tool", "finding"), REFUSED_TOOLS.values(), ids=REFUSED_TOOLS)
def test_a_refusal_names_the_tool(tool: Any, finding: str) -> None:
    with pytest.raises(ConversationError, match=finding):
        build_prompt([user()], [tool])


# What transformers users send every day

LENIENT: dict[str, tuple[list[Message], list[Message]]] = {
    "user without content": ([{"role": "user"}, user("b")], [user(""), user("b")]),
    "user with null": ([user(None)], [user("")]),
    "system with null": ([{"role": "system", "content": None}, user()], [user()]),
    "result with null": (
        [user(), calls("abcdefghi"), result(content=None)],
        [user(), calls("abcdefghi"), result(content="")],
    ),
    "result object": (
        [user(), calls("abcdefghi"), result(content={"t": 22.5, 1: None})],
        [user(), calls("abcdefghi"), result(content='{"t": 22.5, "1": null}')],
    ),
    "result number": (
        [user(), calls("abcdefghi"), result(content=0)],
        [user(), calls("abcdefghi"), result(content="0")],
    ),
    "result boolean": (
        [user(), calls("abcdefghi"), result(content=False)],
        [user(), calls("abcdefghi"), result(content="false")],
    ),
    "call without arguments": (
        [user(), assistant(None, tool_calls=[{"id": "abcdefghi", "function": {"name": "f"}}]), result()],
        [user(), calls("abcdefghi"), result()],
    ),
    "empty chunks beside calls": (
        [user(), assistant([{"type": "text", "text": ""}], tool_calls=[call()]), result()],
        [user(), calls("abcdefghi"), result()],
    ),
}


@pytest.mark.parametrize(("messages", "plain"), LENIENT.values(), ids=LENIENT)
def test_harmless_shapes_are_read(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, messages: list[Message], plain: list[Message]
) -> None:
    expected = reference_ids(reference_tokenizer, Conversation(plain))
    assert our_ids(tokenizer, Conversation(messages)) == expected
    with pytest.raises(ConversationError, match="message"):
        build_prompt(messages, strict=True)


def test_text_beside_calls_is_kept() -> None:
    messages = [user(), assistant("I look. "), assistant("Now.", tool_calls=[call()]), result(), user()]
    assert build_prompt(messages)[4:8] == [
        Segment("I look. \n\nNow.", is_generated=True),
        Segment("[TOOL_CALLS]", is_control=True, is_generated=True),
        Segment('[{"name": "f", "arguments": {}, "id": "abcdefghi"}]', is_generated=True),
        Segment("</s>", is_control=True, is_generated=True),
    ]
    with pytest.raises(ConversationError, match="message 2: content and tool_calls"):
        build_prompt(messages, strict=True)


def test_strict_refuses_a_final_answer() -> None:
    with pytest.raises(ConversationError, match="message 1: a final assistant message"):
        build_prompt([user(), assistant()], strict=True)


# Tool call ids

ID = re.compile("[A-Za-z0-9]{9}")

FOREIGN_IDS: dict[str, tuple[list[Any], list[Any]]] = {
    "openai": (["call_6PEbjQwkYfuSRxVB2rYGIFAh", "call_1"], ["call_6PEbjQwkYfuSRxVB2rYGIFAh", "call_1"]),
    "out of order": (["call_1", "call_2"], ["call_2", "call_1"]),
    "uuid": (["a1b2c3d4-0000-4000-8000-000000000001", "a1b2c3d4-0000-4000-8000-000000000002"],) * 2,
    "same ending": (["x-abcdefghi", "y-abcdefghi", "abcdefghi"],) * 2,
    "running number taken": (["1", "100000000", "2"],) * 2,
    "server": (["req_7_tool_call_0", "req_7_tool_call_1"],) * 2,
    "missing": ([None, None], [None, None]),
    "null": (["null", "null"], ["null", "null"]),
    "empty": (["", ""], [None, ""]),
    "missing on the calls": ([None, "abcdefghi"], ["call_1", "abcdefghi"]),
    "missing on the results": (["call_1", "abcdefghi"], [None, None]),
    "number": ([17, 18], [17, 18]),
    "Unicode digits": (["١٢٣٤٥٦٧٨٩", "１２３４５６７８９"],) * 2,
}


@pytest.mark.parametrize(("called", "answered"), FOREIGN_IDS.values(), ids=FOREIGN_IDS)
def test_foreign_ids_are_mapped(called: list[Any], answered: list[Any]) -> None:
    messages = [user(), calls(*called), *map(result, answered)]
    call_ids, result_ids = prompt_ids(messages)
    assert all(ID.fullmatch(mapped) for mapped in call_ids + result_ids)
    assert len(set(call_ids)) == len(called)
    pairs = {
        str(given): mapped for given, mapped in zip(called, call_ids, strict=True) if given not in (None, "", "null")
    }
    in_place = zip(answered, call_ids, strict=True)
    assert result_ids == [pairs.get(str(given), own) for given, own in in_place]
    # A longer conversation does not change what is mapped already.
    assert prompt_ids([*messages, *messages])[0][: len(called)] == call_ids
    with pytest.raises(ConversationError, match=r"message [12].*: tool call id .* must be 9 letters or digits"):
        build_prompt(messages, strict=True)


def test_valid_ids_stay() -> None:
    given = ["abcdefghi", "000000000", "ZZZZZZZZZ"]
    assert prompt_ids([user(), calls(*given), *map(result, reversed(given))]) == (given, given[::-1])


def test_mapped_conversations_are_the_references(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference
) -> None:
    """Foreign ids cost nothing but the ids: with the mapped ones written in, the reference agrees."""
    for number, conversation in enumerate(conversations("nasty", seed=16, count=80)):
        foreign = _with_foreign_ids(conversation, length=number % 10)
        called, answered = map(iter, prompt_ids(foreign.messages))
        mapped = copy.deepcopy(foreign)
        for message in mapped.messages:
            for item in message.get("tool_calls") or ():
                item["id"] = next(called)
            if message["role"] == "tool":
                message["tool_call_id"] = next(answered)
        assert our_ids(tokenizer, foreign) == reference_ids(reference_tokenizer, mapped)


def _with_foreign_ids(conversation: Conversation, length: int) -> Conversation:
    """Return the conversation with ids whose last 9 letters are their own, or too few of them."""
    messages = copy.deepcopy(conversation.messages)
    for message in messages:
        for item in message.get("tool_calls") or ():
            item["id"] = f"call_{item['id'][:length]}"
        if "tool_call_id" in message:
            message["tool_call_id"] = f"call_{message['tool_call_id'][:length]}"
    return Conversation(messages, conversation.tools, conversation.continue_final_message)
