"""What a request for a chat completion is read into, and where its text ends, without a server."""

import random
import re
from typing import Any

import pytest

from modeling_mistral_large.serving.chat_request import ChatRequest, ToolChoice, read_chat_request
from modeling_mistral_large.serving.completion_text import CompletionReader, StopStrings
from modeling_mistral_large.serving.json_fields import Fields, RequestError, is_number, read_json_object
from modeling_mistral_large.serving.requests import GeneratedToken, TokenChoice
from modeling_mistral_large.serving.served_model import token_choice
from tests.support.errors import whole

QUESTION: dict[str, Any] = {"messages": [{"role": "user", "content": "Who are you?"}]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BIASES: list[Any] = [{"5": 101}, {"x": 1}, {"5": True}, {"²": 1}, [5]]
STOPS: list[Any] = [5, "", ["a", ""], [5], list("abcde"), {}]
OTHER = {"type": "function", "function": {"name": "g"}}


def calls(arguments: Any) -> dict[str, Any]:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"messages": [*QUESTION["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool"}]}


CHOICE_RULE = (
    'tool_choice: must be "auto", "none", "required" or {"type": "function", "function": {"name": …}}; correct it'
)


def bias_problem(value: Any) -> str:
    if isinstance(value, dict):
        return 'logit_bias: must be an object of token ids and biases from -100 to 100, as {"1234": -100}; correct it'
    return "logit_bias: must be an object with a bias for token ids; correct it"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"messages": None}, "messages: missing; pass a list of messages"),
        ({"messages": "hi"}, "messages: must be a list of messages; correct it"),
        ({"messages": {"role": "user", "content": "hi"}}, "messages: must be a list of messages; correct it"),
        ({"messages": []}, "messages: there are none; a conversation has at least one; pass a user message"),
        (
            calls("{bad"),
            "messages[1]: arguments of a call: Expecting <*>; they are the JSON text of an object; correct them",
        ),
        (
            calls("[" * 100_000),
            "messages[1]: arguments of a call: maximum recursion depth <*>; they are the JSON text of an object; "
            "correct them",
        ),
        (
            {"messages": calls("{}")["messages"][:2]},
            "messages[1]: ends the conversation with tool calls, which cannot be continued; add their results",
        ),
        ({"tools": 5}, "tools: must be a list of tool definitions; correct it"),
        ({"tools": TOOL}, "tools: must be a list of tool definitions; correct it"),
        ({"tool_choice": "required"}, "tool_choice: 'required' without tools to call; pass tools"),
        ({"tools": [TOOL], "tool_choice": "must"}, CHOICE_RULE),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice: there is no tool 'g'; the tools are f; choose one",
        ),
        ({"tools": [TOOL], "tool_choice": {"type": "custom", "function": {"name": "f"}}}, CHOICE_RULE),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, CHOICE_RULE),
        ({"tools": [TOOL], "parallel_tool_calls": 0}, "parallel_tool_calls: must be true or false; correct it"),
        ({"functions": [TOOL["function"]]}, "functions: this server cannot obey it; leave it out"),
        ({"function_call": "auto"}, "function_call: this server cannot obey it; leave it out"),
        ({"response_format": "json"}, "response_format: must be an object; correct it"),
        (
            {"response_format": {"type": "xml"}},
            'response_format: must be an object of type "text", "json_object" or "json_schema"; correct it',
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            'response_format: must be {"type": "json_schema", "json_schema": {"name": …, "schema": …}}; correct it',
        ),
        *(({"n": value}, "n: must be a whole number from 1 to 128; correct it") for value in (0, 129, True, "1", 1.0)),
        ({"logprobs": 1}, "logprobs: must be true or false; correct it"),
        ({"top_logprobs": 3}, "top_logprobs: only of a request with logprobs: true; add it, or leave it out"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: must be a whole number from 0 to 20; correct it"),
        ({"frequency_penalty": 2.1}, "frequency_penalty: must be a number from -2 to 2; correct it"),
        ({"presence_penalty": "1"}, "presence_penalty: must be a number from -2 to 2; correct it"),
        ({"repetition_penalty": 0}, "repetition_penalty: must be a number from 0.01 to 100; correct it"),
        *(({"logit_bias": value}, bias_problem(value)) for value in BIASES),
        *(
            ({"stop": value}, "stop: must be a string, or a list of at most 4 strings, none of them empty; correct it")
            for value in STOPS
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort: this server cannot obey it; leave it out"),
        ({"modalities": ["text", "audio"]}, "modalities: this server cannot obey it; leave it out"),
        (
            {"chat_template_kwargs": {"chat_template": "{{ messages }}"}},
            "chat_template_kwargs: this server cannot obey it; leave it out",
        ),
        ({"generation_config": "{}"}, "generation_config: this server cannot obey it; leave it out"),
        ({"temprature": 0}, "temprature: no such parameter here; it would have no effect; leave it out"),
        *(
            ({"top_k": value}, "top_k: must be a whole number from -1 to 2147483648; correct it")
            for value in (-2, 1.5, True)
        ),
        *(({"min_p": value}, "min_p: must be a number from 0 to 1; correct it") for value in (-0.1, 1.1, "0")),
        *(({"stream": value}, "stream: must be true or false; correct it") for value in (1, "false")),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options: only of a request with stream; leave it out, or stream",
        ),
        (
            {"stream": True, "stream_options": {"include_everything": True}},
            "stream_options.include_everything: no such parameter here; it would have no effect; leave it out",
        ),
        *(
            ({"max_tokens": value}, "max_tokens: must be a whole number from 1 to 2147483648; correct it")
            for value in (0, -1, "x", 1.5, True)
        ),
        (
            {"max_completion_tokens": 0},
            "max_completion_tokens: must be a whole number from 1 to 2147483648; correct it",
        ),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "max_tokens and max_completion_tokens: differ; leave one of the two out",
        ),
        *(
            ({"temperature": value}, "temperature: must be 0 or a number from 0.001 to 1000; correct it")
            for value in (-1, "0", float("nan"), float("inf"), 1e-300, 10**400, 1001)
        ),
        *(({"top_p": value}, "top_p: must be a number from 0 to 1; correct it") for value in (1.1, float("nan"))),
        *(
            ({"seed": value}, f"seed: must be a whole number from {-(2**63)} to {2**63 - 1}; correct it")
            for value in ("x", 1.0, 2**63)
        ),
        ({"seed": 1, "random_seed": 2}, "seed and random_seed: differ; leave one of the two out"),
        ({"user": 5}, "user: must be a string; correct it"),
        ({"metadata": "a"}, "metadata: must be an object; correct it"),
    ],
    ids=str,
)
def test_what_a_request_cannot_have_is_refused_by_name(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(RequestError, match=whole(problem)) as caught:
        read_chat_request(QUESTION | options)
    assert caught.value.parameter == re.split(r"[:\[ ]", problem)[0]


def test_what_is_asked_for_is_read() -> None:
    asked = {"tools": [TOOL], "stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 7}
    sampling = {"temperature": 1, "top_p": 0.5, "random_seed": -3, "top_k": -1, "logit_bias": {"7": 1}}
    rest = {"n": 2, "stop": "x", "logprobs": True, "model": "m", "max_tokens": 7}
    assert read_chat_request(QUESTION | asked | sampling | rest) == ChatRequest(
        model="m",
        messages=QUESTION["messages"],
        tool_choice=ToolChoice([TOOL], [TOOL]),
        is_streamed=True,
        includes_usage=True,
        max_tokens=7,
        n=2,
        stop=("x",),
        top_logprobs=0,
        sampling={"temperature": 1.0, "top_p": 0.5, "seed": -3, "top_k": 0, "logit_bias": {7: 1.0}},
    )


@pytest.mark.parametrize(
    ("options", "expected", "is_constrained"),
    [
        ({}, ToolChoice([TOOL, OTHER], [TOOL, OTHER]), False),
        ({"tool_choice": "none"}, ToolChoice(mode="none"), False),
        ({"tool_choice": "any"}, ToolChoice([TOOL, OTHER], [TOOL, OTHER], "required"), True),
        ({"parallel_tool_calls": False}, ToolChoice([TOOL, OTHER], [TOOL, OTHER], is_parallel=False), True),
        ({"tool_choice": {"function": {"name": "g"}}}, ToolChoice([TOOL, OTHER], [OTHER], "required"), True),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]}},
            ToolChoice([TOOL, OTHER], [TOOL]),
            True,
        ),
    ],
    ids=str,
)
def test_which_tools_may_be_called(options: dict[str, Any], expected: ToolChoice, is_constrained: bool) -> None:
    choice = read_chat_request({**QUESTION, "tools": [TOOL, OTHER], **options}).tool_choice
    assert (choice, choice.is_constrained) == (expected, is_constrained)
    strict = {"type": "function", "function": {"name": "h", "strict": True}}
    assert read_chat_request({**QUESTION, "tools": [strict]}).tool_choice.is_constrained


@pytest.mark.parametrize(
    ("asked", "of_folder", "expected"),
    [
        ({}, {"do_sample": True, "temperature": 0.7}, TokenChoice(temperature=0.7)),
        ({}, {"do_sample": True, "top_k": 20}, TokenChoice(top_k=20)),
        ({}, {"do_sample": False, "temperature": 0.7}, TokenChoice(temperature=0)),
        ({}, {}, TokenChoice(temperature=0)),
        ({"temperature": 0}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}, TokenChoice(temperature=0)),
        ({"temperature": 0, "top_p": 0.5}, {"do_sample": True}, TokenChoice(temperature=0)),
        ({"temperature": 2}, {}, TokenChoice(temperature=2)),
        ({"top_p": 0.5}, {}, TokenChoice(top_p=0.5)),
        ({"temperature": 100, "top_p": 1e-9}, {}, TokenChoice(temperature=0)),
        (
            {"temperature": 2, "top_p": 0.5},
            {"do_sample": False, "top_p": 0.9, "repetition_penalty": 1.1},
            TokenChoice(temperature=2, top_p=0.5, repetition_penalty=1.1),
        ),
        ({"seed": -1}, {}, TokenChoice(temperature=0, seed=2**63 - 1)),
        (
            {"logit_bias": {"7": 5}},
            {"suppress_tokens": [7, 8]},
            TokenChoice(temperature=0, logit_bias={7: -float("inf"), 8: -float("inf")}),
        ),
    ],
)
def test_a_request_and_the_folder_choose_tokens(
    asked: dict[str, Any], of_folder: dict[str, Any], expected: TokenChoice
) -> None:
    assert token_choice(read_chat_request(QUESTION | asked).sampling, of_folder) == expected


def test_a_text_is_cut_where_python_cuts_it_whatever_its_pieces() -> None:
    """The stop string that is complete first counts, and of those the longest; nothing of it is given out before."""
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices("ab", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        ends = [(end, end - len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
        expected = text[: min(ends)[1]] if ends else text
        cut = StopStrings(stops)
        found, position = "", 0
        while position < len(text):
            size = rng.randint(1, 4)
            found += cut.feed(text[position : position + size])
            assert expected.startswith(found), (text, stops)
            position += size
        assert (found + cut.finish(), cut.is_stopped) == (expected, bool(ends)), (text, stops)


def test_log_probabilities_come_with_their_text() -> None:
    """Bytes of one character, a stop string over two tokens, and a token that begins before it."""
    pieces = ["", "", "", "", "", "[TOOL_CALLS]", "▁Hi", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁sto", "p▁now", "x"]
    reader = CompletionReader(pieces, stops=["stop"], has_logprobs=True)
    deltas = [reader.take(GeneratedToken(index, -1.0, ((13, -2.0),))) for index in (6, 7, 8, 9, 10, 11, 12)]
    assert [delta.text for delta in deltas] == ["Hi", "", "", "", "😀", " ", ""]
    tokens = [[bytes(entry["bytes"]) for entry in delta.logprobs] for delta in deltas]
    assert tokens == [[b"Hi"], [], [], [], [b"\xf0", b"\x9f", b"\x98", b"\x80"], [b" sto"], []]
    assert deltas[0].logprobs[0]["top_logprobs"] == [{"token": "x", "logprob": -2.0, "bytes": [120]}]
    assert (reader.is_stopped, reader.finish(None).logprobs, reader.finish_reason) == (True, [], "stop")


def test_json_is_read_strictly() -> None:
    assert read_json_object(b'{"a": null, "b": [null], "c": "\\ud83d\\ude00"}') == {"b": [None], "c": "😀"}
    for body, problem in (
        (b"", "no JSON (Expecting <*>); send a JSON object in UTF-8"),
        (b"[]", "no JSON object; send an object with the parameters of the request"),
        (b"5", "no JSON object; send an object with the parameters of the request"),
        (b'{"a": NaN}', "no JSON (NaN is no JSON number); send a JSON object in UTF-8"),
        (b'{"a": -Infinity}', "no JSON (-Infinity is no JSON number); send a JSON object in UTF-8"),
        (b"\xff", "no JSON ('utf-8' codec <*>); send a JSON object in UTF-8"),
        (b'{"a": "\\ud800"}', "no JSON ('utf-8' codec <*>); send a JSON object in UTF-8"),
        (b"[" * 100_000, "nested too deeply; make it flatter"),
    ):
        with pytest.raises(RequestError, match=whole(f"the body: {problem}")):
            read_json_object(body)
    assert [is_number(value) for value in (1, 1.5, True, "1", 1e999, 10**400)] == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    with pytest.raises(RequestError, match=r"^a\.b: must be a whole number from 1 to 2; correct it$"):
        Fields({"b": 3}, "a").whole("b", 1, 2)
