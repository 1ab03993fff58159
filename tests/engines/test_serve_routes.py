"""The routes of our server, each parameter against an oracle: `generate`, the model's logits, Python's own strings."""

import json
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.instruct.tool_call_ids import is_tool_call_id

from .clients import GOLDEN, ask, request_of, stream
from .in_process import NAME, InProcess, serving

QUESTION: list[Any] = [{"role": "user", "content": "Who are you?"}]
GREEDY: dict[str, Any] = {"model": NAME, "messages": QUESTION, "temperature": 0}
TOOLS = GOLDEN["weather_call"].tools
RANDOM_SCHEMAS = int(os.environ.get("MISTRAL_LARGE_SCHEMAS", "20"))


@pytest.fixture(scope="module")
def served(demo_folder: Path) -> Iterator[InProcess]:
    model: Any = MistralLargeForCausalLM.from_pretrained(demo_folder, dtype="float32")
    tokenizer = MistralLargeTokenizer.from_pretrained(demo_folder)
    with serving(model, tokenizer) as server:
        yield server


def generated(served: InProcess, messages: list[Any], **options: Any) -> list[int]:
    """The oracle: ids that `generate` continues messages with, greedily."""
    template = {name: options.pop(name) for name in ("tools", "continue_final_message") if name in options}
    inputs = served.tokenizer.apply_chat_template(messages, return_tensors="pt", **template)
    output = served.model.generate(**inputs, do_sample=False, **{"max_new_tokens": 60, **options})
    ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return ids


def chunks_of(served: InProcess, **request: Any) -> list[Any]:
    return list(served.client.chat.completions.create(**{**GREEDY, **request}, stream=True))


# Stop strings


@pytest.mark.parametrize(
    "stop",
    ["demo", "tiny demo", "d", "I", "Mistral Large. I", ".", "e", "nothing of it", "conversations.", " a", "handful\n"],
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_string_is_where_the_text_is_cut(served: InProcess, stop: str, is_streamed: bool) -> None:
    decode: Any = served.tokenizer.decode
    whole = decode(generated(served, QUESTION), skip_special_tokens=True)
    expected, found, _ = whole.partition(stop)
    answer = (stream if is_streamed else ask)(served.client, {**GREEDY, "stop": stop})
    assert (answer.content, answer.finish_reason) == (expected, "stop")
    assert bool(found) is (stop not in ("nothing of it", "handful\n"))


def test_of_several_stop_strings_the_first_counts(served: InProcess) -> None:
    stops = ["Large", "with the", "zebra", "tiny demo model w"]
    answer = ask(served.client, {**GREEDY, "stop": stops})
    assert answer.content == "I am a "
    # Everything in the text that might begin one comes in time.
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks_of(served, stop=stops)) == "I am a "


def test_a_stop_string_ends_the_computation(served: InProcess) -> None:
    whole = served.client.chat.completions.create(**GREEDY).usage
    cut = served.client.chat.completions.create(**GREEDY, stop="tiny").usage
    assert whole is not None
    assert cut is not None
    assert cut.completion_tokens <= 6 < whole.completion_tokens == len(generated(served, QUESTION))


# Choices, sampling, penalties


@pytest.mark.parametrize("is_streamed", [False, True])
def test_choices_are_told_apart_by_their_number(served: InProcess, is_streamed: bool) -> None:
    request = {**GREEDY, "temperature": 100.0, "seed": 7, "max_tokens": 8, "n": 3}
    texts = ["", "", ""]
    if is_streamed:
        reasons: list[Any] = [None] * 3
        for chunk in served.client.chat.completions.create(**request, stream=True):
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        assert reasons == ["length"] * 3
    else:
        response = served.client.chat.completions.create(**request)
        assert [choice.index for choice in response.choices] == [0, 1, 2]
        texts = [choice.message.content or "" for choice in response.choices]
        assert response.usage is not None
        assert (response.usage.completion_tokens, response.usage.prompt_tokens) == (24, 7)
    assert len({*texts}) == 3
    # The first is that of the same request without `n`, and each that of its own seed.
    for number, text in enumerate(texts):
        assert ask(served.client, {**request, "n": 1, "seed": 7 + number}).content == text


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}, {"temperature": 0, "top_p": 0.1}, {"top_p": 0}], ids=str
)
def test_what_leaves_one_token_is_greedy(served: InProcess, options: dict[str, Any]) -> None:
    status, body = served.chat({**GREEDY, "temperature": 5.0, **options})
    expected = ask(served.client, GREEDY).content
    assert (status, body["choices"][0]["message"]["content"]) == (200, expected)


@pytest.mark.parametrize("penalty", [1.3, 0.9])
def test_a_repetition_penalty_is_that_of_generate(served: InProcess, penalty: float) -> None:
    ids = generated(served, QUESTION, repetition_penalty=penalty, max_new_tokens=20)
    status, body = served.chat({**GREEDY, "repetition_penalty": penalty, "max_tokens": 20})
    expected = served.tokenizer.decode(ids, skip_special_tokens=True)
    assert (status, body["choices"][0]["message"]["content"]) == (200, expected)


@pytest.mark.parametrize("options", [{"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": -2}])
def test_penalties_are_those_of_the_api(served: InProcess, options: dict[str, float]) -> None:
    """Greedily, by hand: a penalty for each time, or once, that a token stands in the response."""
    ids = served.tokenizer.apply_chat_template(QUESTION, return_dict=False)
    written: list[int] = []
    for _ in range(30):
        with torch.no_grad():
            logits = served.model(torch.tensor([[*ids, *written]])).logits[0, -1].float()
        for token in {*written}:
            logits[token] -= options.get("frequency_penalty", 0.0) * written.count(token)
            logits[token] -= options.get("presence_penalty", 0.0)
        written.append(int(logits.argmax()))
        if written[-1] == 2:
            break
    answer = ask(served.client, {**GREEDY, "max_tokens": 30, **options})
    assert answer.content == served.tokenizer.decode(written, skip_special_tokens=True)


def test_a_logit_bias_forbids_and_forces(served: InProcess) -> None:
    first, second = generated(served, QUESTION)[:2]
    forbidden = served.client.chat.completions.create(**GREEDY, logit_bias={str(first): -100}, max_tokens=3)
    assert not (forbidden.choices[0].message.content or "").startswith("I am")
    forced = served.client.chat.completions.create(**GREEDY, logit_bias={str(second): 100}, max_tokens=3)
    piece = served.tokenizer.pieces[second].replace("▁", " ")
    assert forced.choices[0].message.content == (piece * 3).removeprefix(" ")


# Log probabilities


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("stop", [None, "demo model with"])
def test_log_probabilities_are_those_of_the_model(served: InProcess, is_streamed: bool, stop: str | None) -> None:
    request = {**GREEDY, "logprobs": True, "top_logprobs": 3, "frequency_penalty": 0.5, "stop": stop}
    if is_streamed:
        chunks = list(served.client.chat.completions.create(**request, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        found = [entry for chunk in chunks for entry in (chunk.choices[0].logprobs or _NONE).content or []]
    else:
        choice = served.client.chat.completions.create(**request).choices[0]
        text, found = choice.message.content or "", (choice.logprobs or _NONE).content or []
    assert len(found) > 3
    written = b"".join(bytes(entry.bytes or []) for entry in found)
    # A token in which the stop string begins is whole.
    assert written.startswith(text.encode())
    assert stop is not None or written == text.encode()
    prompt = served.tokenizer.apply_chat_template(QUESTION, return_dict=False)
    response = served.tokenizer.encode_texts([written.decode()])[0]
    with torch.no_grad():
        logits = served.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    assert len(found) == len(response)
    for entry, token, row in zip(found, response, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=2e-3)
        values = row.topk(3).values.tolist()
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(values, abs=2e-3)


class _NONE:
    content: list[Any] | None = None


def test_there_are_no_log_probabilities_unasked(served: InProcess) -> None:
    assert served.client.chat.completions.create(**GREEDY).choices[0].logprobs is None
    assert all(choice.logprobs is None for chunk in chunks_of(served) for choice in chunk.choices)


# Continued messages


@pytest.mark.parametrize("begun", ["I am", "I am ", "I am a ti", "I", "Hello", "I am a tiny demo model."])
@pytest.mark.parametrize("prefix", [True, None])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_last_message_of_the_assistant_is_continued(
    served: InProcess, begun: str, prefix: bool | None, is_streamed: bool
) -> None:
    last = {"role": "assistant", "content": begun} | ({"prefix": True} if prefix else {})
    ids = generated(served, [*QUESTION, last], continue_final_message=True, max_new_tokens=30)
    decode: Any = served.tokenizer.decode
    # Behind another token, so that a first space is kept.
    expected = decode([1056, *ids], skip_special_tokens=True).removeprefix(decode([1056]))
    request = {**GREEDY, "messages": [*QUESTION, last], "max_tokens": 30}
    assert (stream if is_streamed else ask)(served.client, request).content == expected


def test_json_is_continued(served: InProcess) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"name": {"enum": ["demo", "other"]}},
        "required": ["name"],
    }
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    last = {"role": "assistant", "content": '{"name": "ot'}
    status, body = served.chat({**GREEDY, "messages": [*QUESTION, last], "response_format": form})
    rest = body["choices"][0]["message"]["content"]
    assert (status, json.loads(last["content"] + rest)) == (200, {"name": "other"})
    last["content"] = "nothing of it"
    for is_streamed in (False, True):
        request = {**GREEDY, "messages": [*QUESTION, last], "response_format": form, "stream": is_streamed}
        status, body = served.chat(request)
        assert (status, body["error"]["param"]) == (400, "response_format")


# Structured output and tool choice


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema whose shortest valid values are short, of what the grammar knows."""
    kinds = ["string", "integer", "boolean", "enum", "const", "null"]
    kinds += ["object", "array", "anyOf", "object"] if depth < 3 else []
    kind = "object" if depth == 0 else rng.choice(kinds)
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(0, 6)}
    if kind == "integer":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 100)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "Ünï", 1, -2.5, True, None, "</s>", "[INST]", '"', "\\n"], rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice([0, "x", {"y": [1]}, [], None])}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + 1}
    if kind == "object":
        names = rng.sample(["a", "b", "long name", "ü", "x-y", "</s>"], rng.randint(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def test_answers_under_random_schemas_are_valid(served: InProcess) -> None:
    """As response formats and as the parameters of a tool that has to be called; at many temperatures, many at once."""

    def one(seed: int) -> None:
        rng = random.Random(seed)
        schema = random_schema(rng)
        request: dict[str, Any] = {**GREEDY, "temperature": rng.choice([0, 1, 3.0]), "seed": seed, "max_tokens": 600}
        if seed % 2:
            request["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        else:
            request["tools"] = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
            # Or a hot model calls again and again until it is cut off.
            request["parallel_tool_calls"] = False
            request["tool_choice"] = rng.choice(["required", {"type": "function", "function": {"name": "f"}}])
        client = served.client.with_options(timeout=900)
        (choice,) = client.chat.completions.create(**request).choices
        assert choice.finish_reason == ("stop" if seed % 2 else "tool_calls"), (seed, choice)
        text = choice.message.content if seed % 2 else choice.message.tool_calls[0].function.arguments
        jsonschema.validate(json.loads(text or ""), schema)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(one, range(RANDOM_SCHEMAS)))


def test_a_schema_that_cannot_be_kept_to_is_a_mistake_of_the_client(served: InProcess) -> None:
    schemas: list[Any] = [{"not": {}}, {"type": "text"}, {"pattern": "(?=a)"}, {"$ref": "https://example.org/x"}]
    for schema in schemas:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        status, body = served.chat({**GREEDY, "response_format": form})
        assert (status, body["error"]["param"]) == (400, "response_format"), schema


OTHER_TOOL = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ("get_current_weather", "other")),
        ("any", ("get_current_weather", "other")),
        ({"type": "function", "function": {"name": "other"}}, ("other",)),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "other"}}]},
            },
            ("other",),
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", [ask, stream])
def test_a_tool_has_to_be_called(served: InProcess, choice: Any, names: tuple[str, ...], how: Any) -> None:
    for question in ("Who are you?", "What's the weather like in Paris?"):
        messages = [{"role": "user", "content": question}]
        request = {**GREEDY, "messages": messages, "tools": [*(TOOLS or []), OTHER_TOOL], "tool_choice": choice}
        answer = how(served.client, {**request, "parallel_tool_calls": False})
        assert (answer.content, answer.finish_reason, len(answer.calls)) == ("", "tool_calls", 1)
        assert answer.calls[0]["name"] in names
        assert all(map(is_tool_call_id, answer.call_ids))


def test_calls_that_are_not_to_be_parallel_are_one(served: InProcess) -> None:
    request = request_of(GOLDEN["weather_parallel_call"], NAME)
    assert len(ask(served.client, request).calls) == 2
    assert len(ask(served.client, {**request, "parallel_tool_calls": False}).calls) == 1


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [OTHER_TOOL, OTHER_TOOL], "tool_choice": "required"}, "tool_choice"),
    ],
    ids=str,
)
def test_choices_that_no_answer_can_keep_to(served: InProcess, options: dict[str, Any], parameter: str) -> None:
    status, body = served.chat({**GREEDY, **options})
    assert (status, body["error"]["param"]) == (400, parameter)


def test_without_llguidance_the_extra_is_named(served: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    status, body = served.chat({**GREEDY, "response_format": {"type": "json_object"}})
    assert status == 400
    assert "pip install 'modeling-mistral-large[structured]'" in body["error"]["message"]
