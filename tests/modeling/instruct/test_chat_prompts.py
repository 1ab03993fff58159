"""Prompts against the reference: the same ids where it accepts, a refusal where it refuses, choices where we say so.

MISTRAL_LARGE_CONVERSATIONS=100000 pytest -n 2 tests/modeling/instruct/test_chat_prompts.py compares that
many conversations.
"""

import copy
import json
import os
import re
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass, replace
from datetime import date
from decimal import Decimal
from enum import Enum
from functools import cache
from itertools import chain, pairwise, product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pydantic
import pytest
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct import prompt
from modeling_mistral_large.instruct.prompt import Segment
from tests.modeling.instruct.conftest import BuildPrompt
from tests.support.conversations import (
    KINDS,
    ODD_TOOLS,
    Conversation,
    Kind,
    conversations,
    invalid_conversations,
    reference_ids,
    reference_request,
    reference_sample_ids,
    training_samples,
)
from tests.support.errors import raises_exactly, whole

Reference = MistralTokenizer[Any, Any, Any, Any, Any]
Message = dict[str, Any]

CONVERSATIONS = int(os.environ.get("MISTRAL_LARGE_CONVERSATIONS", "1200"))
BATCHES = 8


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


def prompt_ids(segments: list[Segment]) -> tuple[list[str], list[str]]:
    """Return the ids of the calls and of the results in a prompt."""
    texts = [segment.text for segment in segments]
    called = [json.loads(text) for mark, text in pairwise(texts) if mark == "[TOOL_CALLS]"]
    answered = [text for mark, text in pairwise(texts) if mark == "[TOOL_RESULTS]"]
    return [item["id"] for item in chain.from_iterable(called)], [
        json.loads(text)["call_id"] if text.startswith("{") else text for text in answered
    ]


# The reference's ids


@pytest.fixture(scope="module")
def finetuning_reference(tokenizer_model_file: Path) -> Reference:
    reference: Reference = MistralTokenizer.from_file(tokenizer_model_file, mode=ValidationMode.finetuning)
    return reference


@pytest.mark.parametrize("batch", [0, *(pytest.param(batch, marks=pytest.mark.slow) for batch in range(1, BATCHES))])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_references(
    prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, kind: Kind, batch: int
) -> None:
    for conversation in conversations(
        kind, prompt_format=prompt_format, seed=batch, count=CONVERSATIONS // (len(KINDS) * BATCHES)
    ):
        assert our_ids(tokenizer, conversation) == reference_ids(reference_tokenizer, conversation), conversation


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "unusual")) for kind in KINDS])
def test_strict_accepts_what_the_reference_accepts(
    prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, kind: Kind
) -> None:
    for conversation in conversations(kind, prompt_format=prompt_format, seed=11, count=40):
        expected = reference_ids(reference_tokenizer, conversation)
        assert our_ids(tokenizer, conversation, strict=True) == expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_final_answer_is_what_the_reference_trains_on(
    prompt_format: str, tokenizer: MistralLargeTokenizer, finetuning_reference: Reference, kind: Kind
) -> None:
    compared = 0
    for conversation in conversations(kind, prompt_format=prompt_format, seed=12, count=60):
        if conversation.messages[-1]["role"] == "assistant":
            continue
        for answer in (assistant("done  "), calls("ABCDEFGHI", "123456789")):
            finished = Conversation([*conversation.messages, answer], conversation.tools)
            try:
                expected = reference_ids(finetuning_reference, finished)
            # Calls without results, and results without calls, are not for training.
            except (MistralCommonException, ValueError):
                continue
            compared += 1
            assert our_ids(tokenizer, finished) == expected
    assert compared > 30


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "unusual"])
def test_a_rendered_prompt_encodes_to_the_same_ids(
    prompt_format: str, tokenizer: MistralLargeTokenizer, kind: Kind
) -> None:
    for conversation in conversations(kind, prompt_format=prompt_format, seed=13, count=60):
        text = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            continue_final_message=conversation.continue_final_message,
            tokenize=False,
        )
        assert tokenizer.encode(text, add_special_tokens=False) == our_ids(tokenizer, conversation)


def test_a_batch_is_the_same_as_one_by_one(prompt_format: str, tokenizer: MistralLargeTokenizer) -> None:
    drawn = [
        conversation.messages
        for conversation in conversations("unusual", prompt_format=prompt_format, seed=14, count=20)
    ]
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


def test_the_callers_data_stays_as_it_is(prompt_format: str, tokenizer: MistralLargeTokenizer) -> None:
    for conversation in chain(
        conversations("unusual", prompt_format=prompt_format, seed=15, count=50),
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


def test_messages_may_be_mappings_dataclasses_and_pydantic_models(build_prompt: BuildPrompt) -> None:
    @dataclass
    class Said:
        role: str
        content: str

    expected = build_prompt([user("a"), assistant("b"), user("c")])
    assert build_prompt([Said("user", "a"), Said("assistant", "b"), Said("user", "c")]) == expected
    assert build_prompt([MappingProxyType(message) for message in (user("a"), assistant("b"), user("c"))]) == expected
    native = [UserMessage(content="a"), AssistantMessage(content="b"), UserMessage(content="c")]
    assert build_prompt(native) == expected


@cache
def model_of(*fields: str) -> Any:
    types: dict[str, Any] = dict.fromkeys(fields, (Any, ...))
    return pydantic.create_model("Fields", **types)


@cache
def dataclass_of(*fields: str) -> Any:
    return make_dataclass("Fields", fields)


def as_objects(value: Any) -> Any:
    """Return messages and all that is in them as objects with the fields of the dicts."""
    if isinstance(value, dict):
        fields = {name: item if name == "arguments" else as_objects(item) for name, item in value.items()}
        return model_of(*fields)(**fields)
    return tuple(map(as_objects, value)) if isinstance(value, list) else value


def as_dataclasses(value: Any) -> Any:
    if isinstance(value, dict):
        fields = {name: item if name == "arguments" else as_dataclasses(item) for name, item in value.items()}
        return dataclass_of(*fields)(**fields)
    return deque(map(as_dataclasses, value)) if isinstance(value, list) else value


def as_mappings(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({name: as_mappings(item) for name, item in value.items()})
    return list(map(as_mappings, value)) if isinstance(value, list) else value


class Text(str):
    """A text of a library's own."""

    def __str__(self) -> str:
        return "not the text"


def as_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_texts(item) for name, item in value.items()}
    if isinstance(value, list):
        return list(map(as_texts, value))
    return Text(value) if isinstance(value, str) else value


@pytest.mark.slow
@pytest.mark.parametrize("convert", [as_objects, as_dataclasses, as_mappings, as_texts])
def test_objects_are_read_at_every_depth(
    prompt_format: str, tokenizer: MistralLargeTokenizer, convert: Callable[[Any], Any]
) -> None:
    for conversation in conversations("unusual", prompt_format=prompt_format, seed=17, count=40):
        expected = our_ids(tokenizer, conversation)
        messages: list[Any] = [convert(message) for message in conversation.messages]
        assert our_ids(tokenizer, replace(conversation, messages=messages)) == expected
        # Dicts with objects in them, as the answer of a client is put back.
        messages = [{key: convert(value) for key, value in message.items()} for message in conversation.messages]
        assert our_ids(tokenizer, replace(conversation, messages=messages)) == expected


@pytest.mark.slow
def test_tools_may_be_objects(
    prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference
) -> None:
    for conversation in conversations("unusual", prompt_format=prompt_format, seed=18, count=60):
        if not conversation.tools:
            continue
        expected = reference_ids(reference_tokenizer, conversation)
        native = [Tool.from_openai({"type": "function", **tool}) for tool in conversation.tools]
        half = [{**tool, "function": given.function} for tool, given in zip(conversation.tools, native, strict=True)]
        for tools in (native, tuple(native), half):
            assert our_ids(tokenizer, replace(conversation, tools=tools)) == expected  # type: ignore[arg-type]


@pytest.mark.slow
def test_requests_are_conversations(
    prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference
) -> None:
    for conversation in conversations("unusual", prompt_format=prompt_format, seed=19, count=60):
        request = reference_request(conversation)
        expected = reference_ids(reference_tokenizer, conversation)
        assert tokenizer.apply_chat_template(request, return_dict=False) == expected
        assert tokenizer.apply_chat_template([request], return_dict=False) == [expected]
        fields = {
            "model": "m",
            "temperature": 0.7,
            "messages": conversation.messages,
            "tools": conversation.tools,
            "continue_final_message": conversation.continue_final_message,
        }
        assert tokenizer.apply_chat_template(fields, return_dict=False) == expected
        assert tokenizer.apply_chat_template([fields], return_dict=False) == [expected]
        messages: Any = tuple(conversation.messages)
        assert our_ids(tokenizer, replace(conversation, messages=messages)) == expected


A_LIST = "a conversation is a list of messages, even if there is one; pass [message]"
ITERATOR = iter([user()])

# Of the v3 format.
REQUESTS = {
    "text": ("hi", f"messages 'hi': {A_LIST}"),
    "one message": (user(), f"messages {user()}: {A_LIST}"),
    "iterator": (ITERATOR, f"messages {ITERATOR!r}: {A_LIST}"),
    "nothing": (None, f"messages None: {A_LIST}"),
    "request without messages": ({"tools": []}, f"messages {{'tools': []}}: {A_LIST}"),
    "effort": (
        {"messages": [user()], "reasoning_effort": "high"},
        "reasoning_effort 'high': the v3 format has no place for it; leave it out",
    ),
    "documents": (
        {"messages": [user()], "documents": [{}]},
        "documents [{}]: the v3 format has no place for it; leave it out",
    ),
    "truncated": (
        {"messages": [user()], "truncate_for_context_length": True},
        "truncate_for_context_length True: the v3 format has no place for it; leave it out",
    ),
}


@pytest.mark.parametrize(("conversation", "problem"), REQUESTS.values(), ids=REQUESTS)
def test_what_is_no_conversation_is_refused(
    build_prompt: BuildPrompt, prompt_format: str, conversation: Any, problem: str
) -> None:
    with raises_exactly(ConversationError, problem.replace("v3", prompt_format)):
        build_prompt(conversation)


def test_a_request_has_one_list_of_tools(build_prompt: BuildPrompt) -> None:
    tool = {"name": "f"}
    assert build_prompt({"messages": [user()], "functions": [tool]}) == build_prompt([user()], [tool])
    with raises_exactly(
        ConversationError,
        "tools: the request has its own; a prompt has one list of them; leave one out",
    ):
        build_prompt({"messages": [user()], "tools": [tool]}, [tool])


@pytest.mark.parametrize("tools", [lambda x: x, {"name": "f"}, "f", 7, iter([]), {}, False])
def test_tools_are_a_list(tokenizer: MistralLargeTokenizer, tools: Any) -> None:
    with raises_exactly(ConversationError, f"tools {tools!r}: tools are a list, even if there is one; pass tools=[…]"):
        our_ids(tokenizer, Conversation([user()], tools))


def test_roles_and_types_may_be_enums(build_prompt: BuildPrompt) -> None:
    kinds = Enum("kinds", {"USER": "user", "ASSISTANT": "assistant", "TEXT": "text", "FUNCTION": "function"})
    messages = [
        {"role": kinds.USER, "content": [{"type": kinds.TEXT, "text": "a"}]},
        {"role": kinds.ASSISTANT, "tool_calls": [{**call(), "type": kinds.FUNCTION}]},
    ]
    assert build_prompt(messages) == build_prompt([user("a"), calls("abcdefghi")])


# Keys


def test_keys_that_say_nothing_are_read_over(tokenizer: MistralLargeTokenizer) -> None:
    about: dict[str, Any] = {
        "id": "msg_1",
        "created_at": "2024-07-24",
        "metadata": {"a": 1},
        "cache_control": {"type": "ephemeral"},
        "refusal": None,
        "audio": None,
        "annotations": [],
        "function_call": None,
        "images": (),
        "thinking": "",
        "tool_calls": None,
        "prefix": False,
        "weight": None,
        "reasoning_content": "",
        "provider": {},
    }
    plain = [{"role": "system", "content": "s"}, user([{"type": "text", "text": "a"}]), calls("abcdefghi"), result()]
    messages = copy.deepcopy(plain)
    for part in (*messages, messages[1]["content"][0], messages[2]["tool_calls"][0]):
        part.update({name: value for name, value in about.items() if name not in part})
    assert our_ids(tokenizer, Conversation(messages)) == our_ids(tokenizer, Conversation(plain))


def test_a_name_is_left_out_and_said(tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference) -> None:
    messages = [{"role": "system", "content": "s", "name": "x"}, {**user(), "name": "Ada"}, assistant(name="b"), user()]
    said = (
        "^`name` of a message: the format has no place for it, and leaves it out as the reference does; write it into "
        "the content where the model should know who speaks$"
    )
    with pytest.warns(UserWarning, match=said):
        ids = our_ids(tokenizer, Conversation(messages))
    assert ids == reference_ids(reference_tokenizer, Conversation(messages))


# What some API, library or data set says with a key, and the part of a message that it stands in.
MEANT: tuple[tuple[str, str, Any], ...] = (
    *(("user", "prefix", True), ("user", "tool_calls", [call()]), ("user", "tool_call_id", "abcdefghi")),
    *(("user", "weight", 0), ("user", "images", ["x"]), ("user", "audio", {"id": "a"}), ("user", "attachments", [1])),
    *(("system", "tools", [{}]), ("system", "prefix", True), ("tool", "is_error", True), ("tool", "status", "error")),
    *(("tool", "tool_calls", [call()]), ("tool", "artifact", {"a": 1}), ("tool", "weight", 1)),
    *(("assistant", "refusal", "I will not."), ("assistant", "audio", {"id": "a"}), ("assistant", "train", False)),
    *(("assistant", "annotations", [{"url": "x"}]), ("assistant", "thinking", "hm"), ("assistant", "text", "hm")),
    *(("assistant", "tool_call_id", "abcdefghi"), ("assistant", "training", 0), ("assistant", "reasoning", "hm")),
    *(("chunk", "thinking", "hm"), ("chunk", "citations", [1]), ("call", "custom", {"name": "f"})),
    *(("call", "arguments", {"a": 1}), ("function", "parameters", {"a": 1}), ("function", "input", {"a": 1})),
)


WHERE = {
    "system": "message 0",
    "user": "message 1",
    "chunk": "message 1: content[0]",
    "call": "message 2: tool_calls[0]",
    "function": "message 2: tool_calls[0] (f)",
    "tool": "message 3",
    "assistant": "message 4",
}
CALLED = {
    "system": "a system message",
    "user": "a user message",
    "chunk": "a text chunk",
    "call": "a tool call",
    "function": "a tool call",
    "tool": "a tool message",
    "assistant": "an assistant message",
}


@pytest.mark.parametrize(("place", "key", "value"), MEANT, ids=str)
def test_keys_that_mean_something_are_refused(
    build_prompt: BuildPrompt, prompt_format: str, place: str, key: str, value: Any
) -> None:
    messages = [
        {"role": "system", "content": "s"},
        user([{"type": "text", "text": "a"}]),
        calls("abcdefghi"),
        result(),
        assistant("done"),
    ]
    build_prompt(messages)
    parts = {
        **{message["role"]: message for message in messages},
        "chunk": messages[1]["content"][0],
        "call": messages[2]["tool_calls"][0],
        "function": messages[2]["tool_calls"][0]["function"],
    }
    parts[place][key] = value
    problem = (
        f"{WHERE[place]}: {key} {value!r}; the {prompt_format} format has no such thing in {CALLED[place]}; "
        "move what the model should read into the content, or leave the key out"
    )
    if key == "reasoning":
        problem = f"message 4: reasoning; the {prompt_format} format has no place for reasoning; leave the key out"
    with raises_exactly(ConversationError, problem):
        build_prompt(messages)


def test_old_calls_are_calls(build_prompt: BuildPrompt) -> None:
    """What OpenAI's API had before `tool_calls`."""
    function = {"name": "f", "arguments": '{"a": 1}'}
    old = [
        user(),
        assistant(None, function_call=function),
        {"role": "function", "name": "f", "content": "22"},
        assistant("I look.", function_call=as_objects(function)),
        {"role": "function", "name": "f", "content": "23"},
    ]
    new = [
        user(),
        assistant(None, tool_calls=[{"function": function}]),
        result(None),
        assistant("I look.", tool_calls=[{"function": function}]),
        result(None, "23"),
    ]
    assert build_prompt(old) == build_prompt(new)
    for messages, problem in (
        (
            old[:2],
            "message 1: function_call {'name': 'f', 'arguments': '{\"a\": 1}'}; calls are in tool_calls; move it "
            "there, or leave it out",
        ),
        (
            [user(), calls("abcdefghi"), {**old[2], "tool_call_id": "abcdefghi"}],
            "message 2: role 'function'; the roles are system, developer, user, assistant, tool; choose one of them",
        ),
    ):
        with raises_exactly(ConversationError, problem):
            build_prompt(messages, strict=True)
    with raises_exactly(
        ConversationError,
        "message 1: function_call {'name': 'f', 'arguments': '{\"a\": 1}'}; calls are in tool_calls; move it "
        "there, or leave it out",
    ):
        build_prompt([user(), {**calls("a"), "function_call": function}])


# Results and arguments that are no text

JSON_RESULTS = {
    "list": ([1, "a", None, {"b": [True]}], '[1, "a", null, {"b": [true]}]'),
    "list of texts": (["text"], '["text"]'),
    "list of objects": ([{"text": "x"}, {"kind": "y"}], '[{"text": "x"}, {"kind": "y"}]'),
    "tuple": ((1, 2), "[1, 2]"),
    "number": (-0.5, "-0.5"),
    "numpy": ({"a": np.float32(0.5), "b": np.arange(2)}, '{"a": 0.5, "b": [0, 1]}'),
    "numpy number": (np.int64(7), "7"),
    "date": ([date(2024, 7, 24)], '["2024-07-24"]'),
    "exact": (Decimal("0.1"), "0.1"),
    "object": (
        Conversation([{"role": "x"}]),
        '{"messages": [{"role": "x"}], "tools": null, "continue_final_message": false}',
    ),
}


@pytest.mark.parametrize(("value", "text"), JSON_RESULTS.values(), ids=JSON_RESULTS)
def test_results_and_arguments_of_every_kind_are_json(build_prompt: BuildPrompt, value: Any, text: str) -> None:
    plain = [user(), calls("abcdefghi"), result(content=text)]
    assert build_prompt([*plain[:2], result(content=value)]) == build_prompt(plain)
    problem = f"content {value!r}; a tool result is text; pass it as JSON text"
    if isinstance(value, list | tuple):
        problem = (
            f"content[0] is {value[0]!r}; this model reads text chunks only; "
            'pass {"type": "text", "text": …} or leave it out'
        )
    with raises_exactly(ConversationError, f"message 2: {problem}"):
        build_prompt([*plain[:2], result(content=value)], strict=True)
    called, written = (
        assistant(None, tool_calls=[call(arguments={"v": given})]) for given in (value, json.loads(text))
    )
    assert build_prompt([user(), called]) == build_prompt([user(), written])


# Training samples


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_what_the_reference_trains_on(
    prompt_format: str, tokenizer: MistralLargeTokenizer, finetuning_reference: Reference, kind: Kind
) -> None:
    taken = 0
    for sample in training_samples(kind, prompt_format=prompt_format, seed=41, count=150):
        try:
            expected = reference_sample_ids(finetuning_reference, sample)
        # The reference asserts, too.
        except Exception:
            with pytest.raises(ConversationError):
                our_ids(tokenizer, sample, finetuning=True, strict=True)
            continue
        taken += 1
        assert our_ids(tokenizer, sample, finetuning=True, strict=True) == expected
        assert our_ids(tokenizer, sample, finetuning=True) == expected
        # A final answer is a sample, whether it is said or not.
        assert our_ids(tokenizer, sample) == expected
    assert taken > 50


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(weights, marks=[pytest.mark.slow] * (None in weights and any(weights)))
        for weights in product((None, 0, 1), repeat=3)
    ],
    ids=str,
)
def test_messages_of_weight_0_are_not_trained_on(tokenizer: MistralLargeTokenizer, weights: tuple[Any, ...]) -> None:
    said = [assistant("One. "), calls("abcdefghi"), assistant("Three.")]
    first, second, third = (
        message if weight is None else {**message, "weight": weight}
        for message, weight in zip(said, weights, strict=True)
    )
    messages = [user(), first, user(), second, result(), third]
    output = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True)
    # No tools and no system text move: each message's tokens are the rest of the prompt that ends with it.
    ends = [len(tokenizer.apply_chat_template(messages[: end + 1], return_dict=False)) for end in range(6)]
    mask = [0] * ends[-1]
    for index, weight in zip((1, 3, 5), weights, strict=True):
        mask[ends[index - 1] : ends[index]] = [int(weight != 0)] * (ends[index] - ends[index - 1])
    assert output["assistant_masks"] == mask


def test_messages_of_different_weight_are_kept_apart(build_prompt: BuildPrompt) -> None:
    segments = build_prompt([user(), assistant("a", weight=0), assistant("b", weight=1), assistant("c", weight=1.0)])
    assert [segment.text for segment in segments[4:]] == ["a", "</s>", "b\n\nc", "</s>"]
    assert [segment.is_generated for segment in segments[4:]] == [False, False, True, True]


def test_a_final_call_without_an_id_has_none(build_prompt: BuildPrompt) -> None:
    for given in (None, "null", ""):
        assert build_prompt([user(), calls(given, "call_123456789")])[-2].text == (
            '[{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}, "id": "123456789"}]'
        )
    # One that is to be continued is no sample.
    assert '"id": "100000000"' in build_prompt([user(), calls(None)], continue_final_message=True)[-1].text


SAMPLE_RULE = "a training sample ends with a complete assistant message; add one, or leave finetuning=True out"
NO_SAMPLES = {
    "user": ([user()], f"message 0: its role is user; {SAMPLE_RULE}"),
    "prefix": ([user(), assistant(prefix=True)], f"message 1: a message to be continued; {SAMPLE_RULE}"),
    "results at the end": ([user(), calls("a"), result("a")], f"message 2: its role is tool; {SAMPLE_RULE}"),
    "call without an id": (
        [user(), calls("abcdefghi", None), result(), result(None), assistant()],
        "message 1: tool_calls[1] has no id; a model would learn an invented one; give it and its result one of "
        "`new_tool_call_id`, or leave finetuning=True out",
    ),
    "weight": (
        [user(), assistant(weight=0.5)],
        "message 1: weight 0.5; it is 0 or 1; correct it or leave it out",
    ),
    "weight as text": (
        [user(), assistant(weight="0")],
        "message 1: weight '0'; it is 0 or 1; correct it or leave it out",
    ),
}


@pytest.mark.parametrize(("messages", "problem"), NO_SAMPLES.values(), ids=NO_SAMPLES)
def test_what_is_no_sample_is_refused(build_prompt: BuildPrompt, messages: list[Message], problem: str) -> None:
    with raises_exactly(ConversationError, problem):
        build_prompt(messages, finetuning=True)


def test_errors_quote_the_beginning_of_long_values(build_prompt: BuildPrompt) -> None:
    quoted = "{'x': '" + "y" * 93 + "…"
    with raises_exactly(
        ConversationError,
        f"message 0: content {quoted}; it must be text or a list of text chunks; convert it",
    ):
        build_prompt([user({"x": "y" * 10_000})])


# Refusals


LOSES = (
    "format has no such thing in (a|an) (system|user|assistant|tool) message; move what the model should read into the "
    "content, or leave the key out"
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_we_refuse_what_the_reference_refuses(
    prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, kind: Kind
) -> None:
    refused = 0
    for conversation in invalid_conversations(kind, prompt_format=prompt_format, seed=1, count=400):
        try:
            expected = reference_ids(reference_tokenizer, conversation)
        # pydantic, jsonschema, SentencePiece and plain Python all have their say.
        except Exception:
            refused += 1
            with pytest.raises(ConversationError, match=r"(?s)\A(message \d+|tool \d+|no messages)\b.*: .+; .+\Z"):
                our_ids(tokenizer, conversation, strict=True)
        else:
            if loses_something(conversation):
                with pytest.raises(ConversationError, match=rf"^message \d+: .*; the {prompt_format} {LOSES}$"):
                    our_ids(tokenizer, conversation)
                continue
            assert our_ids(tokenizer, conversation, strict=True) == expected, conversation
            assert our_ids(tokenizer, conversation) == expected, conversation
    assert refused > 100


def loses_something(conversation: Conversation) -> bool:
    """Return whether the reference leaves out a key of a message that is another role's to have."""
    request = reference_request(conversation)
    return any(
        given.get(key) not in (None, False, "", [], {}) and not hasattr(message, key)
        for given, message in zip(conversation.messages, request.messages, strict=True)
        for key in ("tool_calls", "tool_call_id", "prefix")
    )


@pytest.mark.parametrize(
    "tool",
    [pytest.param(tool, marks=[pytest.mark.slow] * (number % 10 > 0)) for number, tool in enumerate(ODD_TOOLS)],
    ids=str,
)
def test_we_refuse_the_tools_the_reference_refuses(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference, tool: dict[str, Any]
) -> None:
    conversation = Conversation([user()], [tool])
    try:
        expected = reference_ids(reference_tokenizer, conversation)
    except Exception:
        with pytest.raises(ConversationError, match=r"\Atool 0( \(f\))?: .+; .+\Z"):
            our_ids(tokenizer, conversation, strict=True)
    else:
        assert our_ids(tokenizer, conversation, strict=True) == expected


ROLES_RULE = "the roles are system, developer, user, assistant, tool; choose one of them"
ALONE_RULE = "a conversation has a user or system message; add one"
CALL_RULE = 'a call is {"id": …, "type": "function", "function": {"name": …, "arguments": …}}; correct it'
TEXT_RULE = 'this model reads text chunks only; pass {"type": "text", "text": …} or leave it out'
RESULTS_RULE = "every tool call has one tool message before the next response; add or remove tool messages"

# Of the v3 format.
REFUSED: dict[str, tuple[list[Any], str]] = {
    "nothing": ([], "no messages: a conversation has at least one; pass a user message"),
    "no message": (["hi"], "message 0: 'hi'; a message is a dict with a role and a content; pass one"),
    "no role": ([{"content": "hi"}], f"message 0: role None; {ROLES_RULE}"),
    "unknown role": ([user(), {"role": "critic", "content": "x"}], f"message 1: role 'critic'; {ROLES_RULE}"),
    "list as a role": ([{"role": [], "content": "x"}], f"message 0: role []; {ROLES_RULE}"),
    "assistant alone": ([assistant()], f"message 0: the only message, and its role is assistant; {ALONE_RULE}"),
    "tool alone": ([result()], f"message 0: the only message, and its role is tool; {ALONE_RULE}"),
    "tool after user": (
        [user(), result()],
        "message 1: role tool after user; what comes there is system, user, assistant; move the message or change its "
        "role",
    ),
    "tool after system": (
        [{"role": "system", "content": "s"}, result(), user()],
        "message 1: role tool after system; what comes there is system, user, assistant; move the message or change "
        "its role",
    ),
    "system after assistant": (
        [user(), assistant(), {"role": "system", "content": "s"}],
        "message 2: role system after assistant; what comes there is user, assistant, tool; move the message or change "
        "its role",
    ),
    "system after tool": (
        [user(), calls("a"), result(), {"role": "developer", "content": "s"}],
        "message 3: role system after tool; what comes there is user, assistant, tool; move the message or change its "
        "role",
    ),
    "prefix in the middle": (
        [user(), assistant(prefix=True), user()],
        "message 1: prefix is true; only the last message can be continued; leave prefix out",
    ),
    "prefix of another type": (
        [user(), assistant(prefix="yes")],
        "message 1: prefix 'yes'; it is true or false; correct it or leave it out",
    ),
    "empty answer": (
        [user(), assistant("")],
        "message 1: neither content nor tool_calls; an assistant message has text or tool calls; leave it out",
    ),
    "no answer": (
        [user(), {"role": "assistant"}, user()],
        "message 1: neither content nor tool_calls; an assistant message has text or tool calls; leave it out",
    ),
    "answer of empty chunks": (
        [user(), assistant([{"type": "text", "text": ""}])],
        "message 1: its text is empty; an assistant message has text or tool calls; leave it out",
    ),
    "missing result": (
        [user(), calls("a", "b"), result("a"), assistant()],
        f"message 3: tool results missing before it: 1; {RESULTS_RULE}",
    ),
    "missing call": (
        [user(), calls("a"), result("a"), result("b"), assistant()],
        f"message 4: tool results without a call before it: 1; {RESULTS_RULE}",
    ),
    "text after calls": (
        [calls("a"), assistant(), user()],
        "message 1: text after tool calls; their results come before it; add tool messages",
    ),
    "number as content": ([user(7)], "message 0: content 7; it must be text or a list of text chunks; convert it"),
    "image": ([user([{"type": "image_url", "image_url": "x"}])], f"message 0: content[0] is 'image_url'; {TEXT_RULE}"),
    "text as a chunk": ([user(["hi"])], f"message 0: content[0] is 'hi'; {TEXT_RULE}"),
    "chunk without text": (
        [user([{"type": "text"}])],
        "message 0: content[0].text is None; it must be a string; convert it",
    ),
    "reasoning": (
        [user(), assistant(reasoning_content="hm")],
        "message 1: reasoning_content; the v3 format has no place for reasoning; leave the key out",
    ),
    "calls of another type": (
        [user(), assistant(None, tool_calls={})],
        "message 1: tool_calls {}; it must be a list of calls; correct it",
    ),
    "no call": ([user(), assistant(None, tool_calls=[None])], f"message 1: tool_calls[0]: None; {CALL_RULE}"),
    "call without a function": (
        [user(), assistant(None, tool_calls=[{"id": "a"}])],
        f"message 1: tool_calls[0]: {{'id': 'a'}}; {CALL_RULE}",
    ),
    "call of another type": (
        [user(), assistant(None, tool_calls=[{**call(), "type": "retrieval"}])],
        "message 1: tool_calls[0]: type 'retrieval'; every call is of type 'function'; correct it",
    ),
    "name of a call": (
        [user(), assistant(None, tool_calls=[call(name="a b")])],
        "message 1: tool_calls[0]: name 'a b'; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; rename the "
        "function",
    ),
    "arguments as a list": (
        [user(), assistant(None, tool_calls=[call(arguments=[])])],
        "message 1: tool_calls[0] (f): arguments []; they are an object or its JSON text; convert them",
    ),
    "arguments that are no JSON": (
        [user(), assistant(None, tool_calls=[call(arguments={"a": b"x"})])],
        "message 1: tool_calls[0]: bytes b'x'; it is no JSON value; convert it to numbers, text, lists and objects of "
        "them",
    ),
    "name of a result": (
        [user(), calls("a"), {**result("a"), "name": "a b"}],
        "message 2: name 'a b'; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; correct it or leave it out",
    ),
    "digits without end": (
        [user(), calls("a"), result("a", "1" * 5000)],
        "message 2: Exceeds the limit <*>; JSON must be readable by Python; shorten or quote it",
    ),
    "brackets without end": (
        [user(), calls("a"), result("a", "[" * 100_000)],
        "message 2: maximum recursion depth <*>; JSON must be readable by Python; shorten or quote it",
    ),
    "surrogate": (
        [user(), assistant("x\ud800")],
        "message 1: lone surrogate '\\ud800' at character 1; text must be Unicode; decode it again or replace the "
        "character",
    ),
    "surrogate in JSON": (
        [user(), calls("a"), result("a", '"\\udc00"')],
        "message 2: lone surrogate '\\udc00' at character 1; text must be Unicode; decode it again or replace the "
        "character",
    ),
}


# v7 takes text with calls, and results unchanged.
TAKEN_BY_V7 = {"text after calls", "digits without end", "brackets without end", "surrogate in JSON"}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_message(build_prompt: BuildPrompt, prompt_format: str, name: str) -> None:
    messages, problem = REFUSED[name]
    if prompt_format == "v7" and name in TAKEN_BY_V7:
        assert build_prompt(messages)
        return
    with pytest.raises(ConversationError, match=whole(problem.replace("v3", prompt_format))):
        build_prompt(messages)


def test_only_an_assistant_message_can_be_continued(build_prompt: BuildPrompt) -> None:
    with raises_exactly(
        ConversationError,
        "message 0: its role is user; only an assistant message can be continued; leave continue_final_message out",
    ):
        build_prompt([user()], continue_final_message=True)


def deep_schema(levels: int, schema: Any = True) -> Any:
    for _ in range(levels):
        schema = {"not": schema}
    return schema


REFUSED_TOOLS: dict[str, tuple[Any, str]] = {
    "no tool": (7, "tool 0: 7; pass an OpenAI tool definition or a Python function"),
    "another type": (
        {"type": "retrieval", "function": {"name": "f"}},
        "tool 0: type 'retrieval'; the only tools of this format are functions; leave it out",
    ),
    "no function": ({"function": "f"}, 'tool 0: no "function"; write {"type": "function", "function": {"name": …}}'),
    "no name": (
        {"function": {}},
        "tool 0: name None; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; rename the function",
    ),
    "name": (
        {"function": {"name": "a b"}},
        "tool 0: name 'a b'; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; rename the function",
    ),
    "description": (
        {"function": {"name": "f", "description": 7}},
        "tool 0 (f): description 7; it must be text or left out",
    ),
    "parameters": (
        {"function": {"name": "f", "parameters": []}},
        "tool 0 (f): parameters []; they must be a JSON schema object; convert them",
    ),
    "schema": (
        {"function": {"name": "f", "parameters": {"properties": {"a": {"type": "text"}}}}},
        "tool 0 (f): parameters.properties.a.type: 'text' is not one of ['array', 'boolean', 'integer', 'null', "
        "'number', 'object', 'string']; the parameters must be a JSON schema (draft 7)",
    ),
    "schema in a list": (
        {"function": {"name": "f", "parameters": {"anyOf": [{}, {"minLength": -1}]}}},
        "tool 0 (f): parameters.anyOf[1].minLength: -1 is less than the minimum of 0; the parameters must be a JSON "
        "schema (draft 7)",
    ),
    "no JSON": (
        {"function": {"name": "f", "parameters": {"default": {1}}}},
        "tool 0: Object of type set is not JSON serializable; only JSON values have a place in a prompt; convert it",
    ),
    "surrogate": (
        {"function": {"name": "f", "description": "\ud800"}},
        "tool 0: lone surrogate '\\ud800' at character 63; text must be Unicode; decode it again or replace the "
        "character",
    ),
    "schema that says the same twice": (
        {"function": {"name": "f", "parameters": {"required": ["a", "a"]}}},
        "tool 0 (f): parameters.required: ['a', 'a'] has non-unique elements; the parameters must be a JSON schema "
        "(draft 7)",
    ),
    "pattern": (
        {"function": {"name": "f", "parameters": {"patternProperties": {"(": {}}}}},
        "tool 0 (f): parameters.patternProperties: '(' is not a 'regex'; the parameters must be a JSON schema (draft "
        "7)",
    ),
    "levels without end": (
        {"function": {"name": "f", "parameters": deep_schema(5000)}},
        "tool 0: maximum recursion depth <*>; a schema has fewer levels; make it flatter",
    ),
    "error at the bottom": (
        {"function": {"name": "f", "parameters": deep_schema(100, {"type": "text"})}},
        "tool 0 (f): parameters" + ".not" * 100 + ".type: 'text' is not one of "
        "['array', 'boolean', 'integer', 'null', 'number', 'object', 'string']; the parameters must be a JSON schema "
        "(draft 7)",
    ),
    "function without docstring": (
        lambda x: x,
        "tool 0: <lambda> has no docstring; the model reads what a function does; write one",
    ),
    "class": (
        Conversation,
        "tool 0: <*> docstring <*>; a function needs a type hint for every argument and a Google-style docstring; add "
        "them",
    ),
}


@pytest.mark.parametrize(("tool", "problem"), REFUSED_TOOLS.values(), ids=REFUSED_TOOLS)
def test_a_refusal_names_the_tool(build_prompt: BuildPrompt, tool: Any, problem: str) -> None:
    with pytest.raises(ConversationError, match=whole(problem)):
        build_prompt([user()], [tool])


# What transformers users send every day

# With what is said where strict=True refuses it.
LENIENT: dict[str, tuple[list[Message], list[Message], str]] = {
    "user without content": (
        [{"role": "user"}, user("b")],
        [user(""), user("b")],
        "message 0: no content; a user message has text; pass a string",
    ),
    "user with null": (
        [user(None)],
        [user("")],
        "message 0: no content; a user message has text; pass a string",
    ),
    "system with null": (
        [{"role": "system", "content": None}, user()],
        [{"role": "system", "content": ""}, user()],
        "message 0: no content; a system message has text; pass a string",
    ),
    "result with null": (
        [user(), calls("abcdefghi"), result(content=None)],
        [user(), calls("abcdefghi"), result(content="")],
        "message 2: no content; a tool message has text; pass a string",
    ),
    "result object": (
        [user(), calls("abcdefghi"), result(content={"t": 22.5, 1: None})],
        [user(), calls("abcdefghi"), result(content='{"t": 22.5, "1": null}')],
        "message 2: content {'t': 22.5, 1: None}; a tool result is text; pass it as JSON text",
    ),
    "result number": (
        [user(), calls("abcdefghi"), result(content=0)],
        [user(), calls("abcdefghi"), result(content="0")],
        "message 2: content 0; a tool result is text; pass it as JSON text",
    ),
    "result boolean": (
        [user(), calls("abcdefghi"), result(content=False)],
        [user(), calls("abcdefghi"), result(content="false")],
        "message 2: content False; a tool result is text; pass it as JSON text",
    ),
    "call without arguments": (
        [user(), assistant(None, tool_calls=[{"id": "abcdefghi", "function": {"name": "f"}}]), result()],
        [user(), calls("abcdefghi"), result()],
        "message 1: tool_calls[0] (f): no arguments; a call has an object of arguments; pass {}",
    ),
    "empty chunks beside calls": (
        [user(), assistant([{"type": "text", "text": ""}], tool_calls=[call()]), result()],
        [user(), calls("abcdefghi"), result()],
        "message 1: content and tool_calls; a response has one; leave strict=True out to keep both",
    ),
}


@pytest.mark.parametrize(("messages", "plain", "problem"), LENIENT.values(), ids=LENIENT)
def test_harmless_shapes_are_read(
    build_prompt: BuildPrompt,
    prompt_format: str,
    tokenizer: MistralLargeTokenizer,
    reference_tokenizer: Reference,
    messages: list[Message],
    plain: list[Message],
    problem: str,
) -> None:
    expected = reference_ids(reference_tokenizer, Conversation(plain))
    assert our_ids(tokenizer, Conversation(messages)) == expected
    if prompt_format == "v7" and messages[1:] and "tool_calls" in messages[1] and messages[1]["content"]:
        assert reference_ids(reference_tokenizer, Conversation(messages)) == expected
        assert our_ids(tokenizer, Conversation(messages), strict=True) == expected
        return
    with raises_exactly(ConversationError, problem):
        build_prompt(messages, strict=True)


def test_text_beside_calls_is_kept(build_prompt: BuildPrompt, prompt_format: str) -> None:
    messages = [user(), assistant("I look. "), assistant("Now.", tool_calls=[call()]), result(), user()]
    segments = build_prompt(messages)
    assert segments[4:8] == [
        Segment("I look. \n\nNow.", is_generated=True),
        Segment("[TOOL_CALLS]", is_control=True, is_generated=True),
        Segment('[{"name": "f", "arguments": {}, "id": "abcdefghi"}]', is_generated=True),
        Segment("</s>", is_control=True, is_generated=True),
    ]
    if prompt_format == "v7":
        assert build_prompt(messages, strict=True) == segments
        return
    with raises_exactly(
        ConversationError,
        "message 2: content and tool_calls; a response has one; leave strict=True out to keep both",
    ):
        build_prompt(messages, strict=True)


def test_tools_without_a_user_are_left_out_and_said(
    build_prompt: BuildPrompt, prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference
) -> None:
    conversation = Conversation([{"role": "system", "content": "s"}], [{"type": "function", "function": {"name": "f"}}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert our_ids(tokenizer, conversation) == reference_ids(reference_tokenizer, conversation)
    said = [str(warning.message) for warning in caught if "tools" in str(warning.message)]
    assert [text.partition(";")[0] for text in said] == (
        ["tools: the v7 format writes them before the last user message, and this conversation has none"]
        if prompt_format == "v7"
        else []
    )


@pytest.mark.parametrize("name", ["v9", "V7", "", None, 7, ["v7"]])
def test_another_format_is_refused(name: Any) -> None:
    problem = f"prompt_format {name!r}: the instruct formats are v3, v7; choose the one the model was trained on"
    with raises_exactly(ConversationError, problem):
        prompt.build_prompt([user()], prompt_format=name)


def test_strict_refuses_a_final_answer(build_prompt: BuildPrompt) -> None:
    with raises_exactly(
        ConversationError,
        "message 1: a final assistant message; a prompt ends with a user or tool message; pass "
        "continue_final_message=True to continue it, finetuning=True to train on it, or leave strict=True out",
    ):
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
def test_foreign_ids_are_mapped(build_prompt: BuildPrompt, called: list[Any], answered: list[Any]) -> None:
    messages = [user(), calls(*called), *map(result, answered)]
    call_ids, result_ids = prompt_ids(build_prompt(messages))
    assert all(ID.fullmatch(mapped) for mapped in call_ids + result_ids)
    assert len(set(call_ids)) == len(called)
    pairs = {
        str(given): mapped for given, mapped in zip(called, call_ids, strict=True) if given not in (None, "", "null")
    }
    in_place = zip(answered, call_ids, strict=True)
    assert result_ids == [pairs.get(str(given), own) for given, own in in_place]
    # A longer conversation does not change what is mapped already.
    assert prompt_ids(build_prompt([*messages, *messages]))[0][: len(called)] == call_ids
    wrong = next(given for given in called if not isinstance(given, str) or not ID.fullmatch(given))
    problem = f"tool call id {wrong!r}; it must be 9 letters or digits; leave strict=True out to have it mapped"
    with raises_exactly(ConversationError, f"message 1: tool_calls[{called.index(wrong)}]: {problem}"):
        build_prompt(messages, strict=True)


def test_valid_ids_stay(build_prompt: BuildPrompt) -> None:
    given = ["abcdefghi", "000000000", "ZZZZZZZZZ"]
    assert prompt_ids(build_prompt([user(), calls(*given), *map(result, reversed(given))])) == (given, given[::-1])


@pytest.mark.slow
def test_mapped_conversations_are_the_references(
    build_prompt: BuildPrompt, prompt_format: str, tokenizer: MistralLargeTokenizer, reference_tokenizer: Reference
) -> None:
    """Foreign ids cost nothing but the ids: with the mapped ones written in, the reference agrees."""
    for number, conversation in enumerate(conversations("unusual", prompt_format=prompt_format, seed=16, count=80)):
        foreign = _with_foreign_ids(conversation, length=number % 10)
        called, answered = map(iter, prompt_ids(build_prompt(foreign.messages)))
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
