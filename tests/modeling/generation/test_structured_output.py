"""Constrained answers: every one that ends is valid, under any scores, and nothing else can be written.

The answers are written under random scores, which know nothing of JSON: only the constraint makes them valid. The
oracles are jsonschema and, for single steps, a regular expression over the bytes of every piece.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import jsonschema
import llguidance
import numpy as np
import pytest
import regex  # type: ignore[import-untyped]
import torch
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import pipeline

from mistral_large_conversion.errors import CheckpointError, MissingLibraryError
from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError, SchemaError
from modeling_mistral_large.generation.structured_output import answer_grammar, constrain
from tests.support import checkpoints, models
from tests.support.errors import raises_exactly, whole

EOS, END_INST, TOOL_CALLS, PAD = 2, 4, 5, 384
# `<unk>` and the control pieces, and the pieces that are text as a whole.
CONTROL_IDS = {"v3": range(751), "v7": range(749)}
USER_DEFINED_IDS = {"v3": range(751, 771), "v7": range(749, 771)}
PROMPT = [1, 3, 5000, 6000, END_INST]
MAX_STEPS = 120

TEXT = {"type": "string", "maxLength": 12}
SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": {
        "type": "object",
        "properties": {
            "name": TEXT,
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "ok": {"type": "boolean"},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "a": {
                "type": "object",
                "properties": {"b": {"type": "object", "properties": {"c": TEXT}, "required": ["c"]}},
            },
            "list": {
                "type": "array",
                "items": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
                "maxItems": 3,
            },
        },
        "required": ["a", "list"],
        "additionalProperties": False,
    },
    "open": {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {"type": "boolean"}},
    "enum": {"enum": ["größe", 'say "hi"', 7, 1.5, None, True, {"k": [1, "日本 🎉"]}, "[INST] </s>"]},
    "unicode keys": {
        "type": "object",
        "properties": {"größe": {"const": "ß"}, '"quoted"\n': {"type": "boolean"}, "🎉": TEXT, "": {"type": "null"}},
        "required": ["🎉", '"quoted"\n'],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "array",
        "items": {
            "anyOf": [
                {"type": "integer", "minimum": -3, "maximum": 1000, "multipleOf": 7},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 2.5},
            ]
        },
        "minItems": 2,
        "maxItems": 4,
    },
    "references": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"$ref": "#/$defs/value"},
                    "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                },
                "required": ["value"],
                "additionalProperties": False,
            },
            "value": {"type": ["string", "integer"], "maxLength": 5, "minimum": 0, "maximum": 9},
        },
        "$ref": "#/$defs/node",
    },
    "strings": {
        "type": "object",
        "properties": {
            "day": {"type": "string", "format": "date"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "short": {"type": "string", "minLength": 2, "maxLength": 3},
            # No program knows this format, so it is a remark.
            "colour": {"type": "string", "format": "colour", "maxLength": 3},
        },
        "required": ["day", "code", "short", "colour"],
        "additionalProperties": False,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": TEXT}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ],
        "properties": {"c": {"type": "integer", "maximum": 9, "minimum": 0}},
    },
    "tuple": {"type": "array", "prefixItems": [TEXT, {"type": "integer", "maximum": 99, "minimum": 0}], "items": False},
    "any object": {
        "type": "object",
        "patternProperties": {"^x": TEXT},
        "minProperties": 1,
        "additionalProperties": False,
    },
}


def get_weather(city: str, unit: str = "celsius", days: int = 1) -> str:
    """Get the weather.

    Args:
        city: The city.
        unit: The unit. (choices: ["celsius", "fahrenheit"])
        days: How many days.
    """
    return f"{city} {unit} {days}"


TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "pay", "parameters": SCHEMAS["flat"]}},
    {
        "type": "function",
        "function": {"name": "pay-all", "description": "# // [TOOL_CALLS]", "parameters": SCHEMAS["nested"]},
    },
    {"type": "function", "function": {"name": "ping"}},
    # The reference takes a name that ends in a line break.
    {"type": "function", "function": {"name": "odd\n", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "free", "parameters": {"type": "object"}}},
    {"function": {"name": "switch", "parameters": {"properties": {"on": {"type": "boolean"}}}}},
    get_weather,
]
PARAMETERS: dict[str, dict[str, Any]] = {
    "pay": SCHEMAS["flat"],
    "pay-all": SCHEMAS["nested"],
    "ping": {"type": "object", "maxProperties": 0},
    "odd\n": {"type": "object", "maxProperties": 0},
    "free": {"type": "object"},
    "switch": {"type": "object", "properties": {"on": {"type": "boolean"}}, "additionalProperties": False},
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "days": {"type": "integer"},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
}


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


class Writer:
    """Writes answers under random scores, which know nothing of JSON or tools.

    Without a little help no answer would end: quotes, closing brackets, `</s>` and `[TOOL_CALLS]` are more likely. So
    are tokens that must never come.
    """

    def __init__(self, tokenizer: MistralLargeTokenizer) -> None:
        random = torch.Generator().manual_seed(2407)
        likely = torch.tensor([3.0 * any(mark in piece for mark in '"]}') for piece in tokenizer.pieces])
        likely[[EOS, TOOL_CALLS]] = 5.0
        likely[[0, 1, END_INST, PAD, 700]] = 9.0
        self.scores = torch.randn(97, len(likely), generator=random) + likely

    def __call__(
        self,
        processors: Any,
        seed: int,
        rows: int = 4,
        *,
        prompts: Tensor | None = None,
        max_steps: int = MAX_STEPS,
        is_fixed: bool = False,
    ) -> list[list[int]]:
        """Return one answer a row, up to and with `</s>` where it ends.

        is_fixed: every step has the same scores, as if the model repeated itself.
        """
        random = torch.Generator().manual_seed(seed)
        ids = torch.tensor([PROMPT] * rows) if prompts is None else prompts
        start = ids.shape[1]
        has_ended = torch.zeros(len(ids), dtype=torch.bool)
        choice = torch.randint(len(self.scores), (len(ids),), generator=random)
        scores = self.scores[choice]
        for _ in range(max_steps):
            chosen = processors(ids, scores).argmax(-1)
            chosen[has_ended] = PAD
            has_ended |= chosen == EOS
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            if has_ended.all():
                break
            if not is_fixed:
                scores = self.scores[torch.randint(len(self.scores), (len(ids),), generator=random)]
        return [row[: row.index(EOS) + 1] if EOS in row else row for row in ids[:, start:].tolist()]


@pytest.fixture(scope="module", params=["v3", "v7"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MistralLargeTokenizer:
    return checkpoints.vendor_tokenizer(tmp_path_factory.mktemp("tokenizer"), request.param)


# What is about `generate`, and not about a vocabulary.
of_v3 = pytest.mark.parametrize("tokenizer", ["v3"], indirect=True)


@pytest.fixture(scope="module")
def write(tokenizer: MistralLargeTokenizer) -> Writer:
    return Writer(tokenizer)


def step(processors: Any, *rows: list[int], tokens: int = 32768) -> Tensor:
    """Return the scores [rows, tokens] after these rows, of which all were 0."""
    scores: Tensor = processors(torch.tensor(rows), torch.zeros(len(rows), tokens))
    return scores


def steps(processors: Any, begun: list[int]) -> list[int]:
    """Return the tokens allowed after an answer that is written one token at a time."""
    scores = torch.zeros(0)
    for length in range(len(begun) + 1):
        scores = step(processors, PROMPT + begun[:length])[0]
    return allowed(scores)


def allowed(scores: Tensor) -> list[int]:
    assert set(scores.tolist()) <= {0, -torch.inf}
    ids: list[int] = (scores == 0).nonzero()[:, 0].tolist()
    return ids


def read_text(tokenizer: MistralLargeTokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def validate(value: Any, schema: Any) -> None:
    """Raise where a value is not valid under a schema, which jsonschema.validate would check as well, each time."""
    jsonschema.Draft202012Validator(schema).validate(value)


def assert_json(tokenizer: MistralLargeTokenizer, ids: list[int], schema: Any) -> None:
    """Check an answer that has ended: JSON under the schema, spaced as the prompt's JSON is, no control ids."""
    assert ids[-1] == EOS
    assert not {*ids[:-1]} & {*range(771)}
    text = read_text(tokenizer, ids[:-1])
    value = json.loads(text)
    validate(value, schema)
    json.dumps(value, ensure_ascii=False).encode()  # raises for a lone surrogate
    assert not regex.search(r'[\t\r\n]|[,:]  | [,:]|[{\[] |" [}\]]', regex.sub(r'"(?:[^"\\]|\\.)*"', '""', text))


# Schemas


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("is_fixed", [False, True])
def test_every_answer_is_valid_under_its_schema(
    tokenizer: MistralLargeTokenizer, write: Writer, name: str, is_fixed: bool
) -> None:
    processors = constrain(tokenizer, response_format=schema_format(SCHEMAS[name]))
    # The longest answer that ends has 59 tokens.
    answers = [ids for seed in range(8) for ids in write(processors, seed, max_steps=64, is_fixed=is_fixed)]
    ended = [ids for ids in answers if ids[-1] == EOS]
    # Scores that never change may never end a string or a list.
    assert len(ended) > len(answers) // 2 or is_fixed
    for ids in ended:
        assert_json(tokenizer, ids, SCHEMAS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("response_format", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        (schema_format({}), True),
        (schema_format(True), True),
        (schema_format({"type": "object"}), {"type": "object"}),
    ],
)
def test_json_without_a_schema(
    tokenizer: MistralLargeTokenizer,
    write: Writer,
    response_format: dict[str, Any],
    schema: Any,
) -> None:
    processors = constrain(tokenizer, response_format=response_format)
    ended = [ids for seed in range(8) for ids in write(processors, seed) if ids[-1] == EOS]
    assert len(ended) > 16
    for ids in ended:
        assert_json(tokenizer, ids, schema)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_truncated_answer_can_always_be_completed(tokenizer: MistralLargeTokenizer, write: Writer, name: str) -> None:
    processors = constrain(tokenizer, response_format=schema_format(SCHEMAS[name]))
    for length in range(1, 40, 9):
        begun = [ids for ids in write(processors, length, max_steps=length) if ids[-1] != EOS]
        if not begun:
            continue
        # A constraint of its own, which knows of the beginning only through the prompt.
        rest = constrain(tokenizer, response_format=schema_format(SCHEMAS[name]), continue_final_message=True)
        completed = write(rest, 7, prompts=torch.tensor([PROMPT + ids for ids in begun]))
        ended = [first + second for first, second in zip(begun, completed, strict=True) if second[-1] == EOS]
        assert ended
        for ids in ended:
            assert_json(tokenizer, ids, SCHEMAS[name])


def test_json_is_what_the_reference_writes(tokenizer: MistralLargeTokenizer) -> None:
    value = {"name": 'Zoë "Z" 日本 🎉\n\\', "n": 36, "on": None}
    ids = [*tokenizer.encode_texts([json.dumps(value, ensure_ascii=False)])[0], EOS]
    processors = constrain(tokenizer, response_format=schema_format(_STEP_SCHEMA))
    for length, token in enumerate(ids):
        assert token in allowed(step(processors, PROMPT + ids[:length])[0])


# Single steps, against an oracle that is not the library

_UTF8 = (
    rb"[\xc2-\xdf][\x80-\xbf]|\xe0[\xa0-\xbf][\x80-\xbf]|[\xe1-\xec\xee\xef][\x80-\xbf]{2}|\xed[\x80-\x9f][\x80-\xbf]"
    rb"|\xf0[\x90-\xbf][\x80-\xbf]{2}|[\xf1-\xf3][\x80-\xbf]{3}|\xf4[\x80-\x8f][\x80-\xbf]{2}"
)
_CONTROL = rb"u00(?:0[0-9a-fA-F]|1[0-9a-fA-F]|7[fF])"
_STRING = rb'"(?:[\x20\x21\x23-\x5b\x5d-\x7e]|' + _UTF8 + rb'|\\(?:["\\bfnrt]|' + _CONTROL + rb'))*"'
_LANGUAGE = regex.compile(
    rb' \{"name": ' + _STRING + rb', "n": (?:0|-?[1-9][0-9]*|-0)(?:, "on": (?:true|false|null|"\xc3\x9f"))?\}'
)
_STEP_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}, "on": {"enum": [True, False, None, "ß"]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def piece_bytes(tokenizer: MistralLargeTokenizer) -> dict[int, bytes]:
    """What every id writes that text is encoded to, from the pieces' names."""
    pieces = tokenizer.pieces
    own = {piece for piece in pieces[1027:] if piece.isascii()} | {" "}
    table = {index: piece.replace("▁", " ").encode() for index, piece in enumerate(pieces) if index >= 1027}
    # A byte with a piece of its own is never written as a byte.
    table |= {771 + byte: bytes([byte]) for byte in range(256) if byte > 127 or chr(byte) not in own}
    return table


@pytest.mark.parametrize(
    "text",
    [
        "",
        pytest.param('{"na', marks=pytest.mark.slow),
        pytest.param('{"name": "', marks=pytest.mark.slow),
        pytest.param('{"name": "a', marks=pytest.mark.slow),
        '{"name": "a\\',
        pytest.param('{"name": "a\\u00', marks=pytest.mark.slow),
        pytest.param('{"name": "é🎉 ', marks=pytest.mark.slow),
        pytest.param('{"name": "", "n": ', marks=pytest.mark.slow),
        pytest.param('{"name": "", "n": -', marks=pytest.mark.slow),
        '{"name": "", "n": 12',
        pytest.param('{"name": "", "n": 12, "on": ', marks=pytest.mark.slow),
    ],
)
def test_a_step_allows_exactly_what_the_language_allows(
    tokenizer: MistralLargeTokenizer, piece_bytes: dict[int, bytes], text: str
) -> None:
    processors = constrain(tokenizer, response_format=schema_format(_STEP_SCHEMA))
    found = steps(processors, tokenizer.encode_texts([text])[0])
    written = f" {text}".encode() if text else b""
    expected = [index for index, more in piece_bytes.items() if _LANGUAGE.fullmatch(written + more, partial=True)]
    assert found == sorted(expected)


def test_incomplete_characters_are_completed(tokenizer: MistralLargeTokenizer) -> None:
    processors = constrain(tokenizer, response_format=schema_format(_STEP_SCHEMA))
    begun = [*tokenizer.encode_texts(['{"name": "'])[0], 771 + 0xF0, 771 + 0x9F]
    assert steps(processors, begun) == [771 + byte for byte in range(0x80, 0xC0)]


@pytest.mark.slow
def test_calls_are_what_the_reference_writes(tokenizer: MistralLargeTokenizer) -> None:
    calls = [
        {"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}, "id": "abcDEF123"},
        {"name": "pay", "arguments": {"name": "Zoë", "age": 36}},
    ]
    ids = [TOOL_CALLS, *tokenizer.encode_texts([json.dumps(calls, ensure_ascii=False)])[0], EOS]
    processors = constrain(tokenizer, tools=TOOLS, tool_choice="required")
    for length, token in enumerate(ids):
        assert token in allowed(step(processors, PROMPT + ids[:length])[0])


REQUESTS: dict[str, dict[str, Any]] = {
    "text": {},
    "auto": {"tools": TOOLS},
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "JSON": {"response_format": {"type": "json_object"}},
    "schema or calls": {"tools": TOOLS, "response_format": schema_format(SCHEMAS["nested"])},
}


@pytest.mark.parametrize("name", ["v3", pytest.param("v7", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "request_", ["auto", *(pytest.param(name, marks=pytest.mark.slow) for name in REQUESTS if name != "auto")]
)
def test_every_token_that_is_allowed_can_follow(tmp_path: Path, name: str, request_: str) -> None:
    """Also where a token is spelled like the beginning of how the library names another, as the byte of `[` is."""
    tokenizer = checkpoints.vendor_tokenizer(tmp_path, name)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[", "[5", "<5>"]})
    constraint: Any = constrain(tokenizer, **REQUESTS[request_])[0]
    rng = random.Random(1)
    for _ in range(3):
        matcher, written = constraint._start.deep_copy(), 0
        while written < 12 and not matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed_ids = np.flatnonzero(bits).tolist()
            # All that are no pieces of text, and some that are.
            odd = [index for index in allowed_ids if index < 1027 or index >= 32768]
            tried = odd + rng.sample(allowed_ids, min(20, len(allowed_ids)))
            refused = [index for index in tried if matcher.deep_copy().try_consume_tokens([index]) != 1]
            assert refused == []
            matcher.consume_token(rng.choice([index for index in tried if index != EOS] or [EOS]))
            written += 1
        assert written > 0


# Tools


def read_calls(tokenizer: MistralLargeTokenizer, ids: list[int]) -> list[dict[str, Any]]:
    """The calls of an answer that has ended, checked: format, names, arguments, ids."""
    assert ids[-1] == EOS
    assert ids.count(TOOL_CALLS) == 1
    calls_at = ids.index(TOOL_CALLS)
    assert not {*ids[:calls_at]} & {*CONTROL_IDS[tokenizer.vocabulary.name]}
    assert not {*ids[calls_at + 1 : -1]} & {*range(771)}
    text = read_text(tokenizer, ids[calls_at + 1 : -1])
    calls: list[dict[str, Any]] = json.loads(text)
    for call in calls:
        assert list(call) in (["name", "arguments"], ["name", "arguments", "id"])
        assert regex.fullmatch("[a-zA-Z0-9]{9}", call.get("id", "123456789"))
        validate(call["arguments"], PARAMETERS[call["name"]])
        assert isinstance(call["arguments"], dict)
    message = tokenizer.parse_response(ids)
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": call["name"], "arguments": call["arguments"]} for call in calls
    ]
    return calls


def test_any_is_another_name_of_required() -> None:
    grammars = {answer_grammar(tools=TOOLS, tool_choice=choice) for choice in ("any", "required")}
    assert len(grammars) == 1


def ended_answers(write: Writer, processors: Any, seeds: range) -> list[list[int]]:
    answers = [ids for seed in seeds for ids in write(processors, seed, is_fixed=seed % 4 == 3)]
    ended = [ids for ids in answers if ids[-1] == EOS]
    assert len(ended) > len(answers) // 3
    return ended


@pytest.mark.slow
def test_required(tokenizer: MistralLargeTokenizer, write: Writer) -> None:
    ended = ended_answers(write, constrain(tokenizer, tools=TOOLS, tool_choice="required"), range(8))
    calls = [read_calls(tokenizer, ids) for ids in ended]
    assert {ids[0] for ids in ended} == {TOOL_CALLS}
    assert {call["name"] for answer in calls for call in answer} >= {*PARAMETERS} - {"pay-all"}
    assert max(map(len, calls)) > 1
    assert {"id" in call for answer in calls for call in answer} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_named(tokenizer: MistralLargeTokenizer, write: Writer, name: str) -> None:
    processors = constrain(tokenizer, tools=TOOLS, tool_choice=named(name))
    for ids in ended_answers(write, processors, range(4)):
        assert {call["name"] for call in read_calls(tokenizer, ids)} == {name}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", "auto", named("ping")])
def test_no_parallel_calls(tokenizer: MistralLargeTokenizer, write: Writer, choice: Any) -> None:
    processors = constrain(tokenizer, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
    answers = [ids for ids in ended_answers(write, processors, range(6)) if TOOL_CALLS in ids]
    assert answers
    for ids in answers:
        assert len(read_calls(tokenizer, ids)) == 1


@pytest.mark.slow
def test_auto_writes_text_calls_or_both(tokenizer: MistralLargeTokenizer, write: Writer) -> None:
    ended = ended_answers(write, constrain(tokenizer, tools=TOOLS), range(12))
    kinds = set()
    for ids in ended:
        if TOOL_CALLS in ids:
            read_calls(tokenizer, ids)
            kinds.add("text and calls" if ids[0] != TOOL_CALLS else "calls")
        else:
            assert not {*ids[:-1]} & {*CONTROL_IDS[tokenizer.vocabulary.name]}
            kinds.add("text")
    assert kinds == {"text", "calls", "text and calls"}
    # They are text, as the vocabulary has them.
    assert any({*ids} & {*USER_DEFINED_IDS[tokenizer.vocabulary.name]} for ids in ended)


@pytest.mark.parametrize(
    "request_",
    [
        {"tools": TOOLS, "tool_choice": "none"},
        pytest.param(
            {"tools": TOOLS, "tool_choice": "none", "response_format": {"type": "text"}}, marks=pytest.mark.slow
        ),
        {},
        pytest.param({"tools": []}, marks=pytest.mark.slow),
    ],
)
def test_none_writes_text_only(tokenizer: MistralLargeTokenizer, write: Writer, request_: dict[str, Any]) -> None:
    for seed in range(3):
        for ids in write(constrain(tokenizer, **request_), seed, max_steps=200):
            assert not {*ids} & {*CONTROL_IDS[tokenizer.vocabulary.name]} - {EOS}
    first = steps(constrain(tokenizer, **request_), [])
    assert len(first) > 31_000
    assert [index for index in first if index < 771] == [EOS, *USER_DEFINED_IDS[tokenizer.vocabulary.name]]


@pytest.mark.slow
def test_json_or_calls(tokenizer: MistralLargeTokenizer, write: Writer) -> None:
    processors = constrain(tokenizer, tools=TOOLS, response_format=schema_format(SCHEMAS["flat"]))
    kinds = set()
    for ids in ended_answers(write, processors, range(8)):
        kinds.add(ids[0] == TOOL_CALLS)
        if ids[0] == TOOL_CALLS:
            read_calls(tokenizer, ids)
        else:
            assert_json(tokenizer, ids, SCHEMAS["flat"])
    assert kinds == {True, False}


# The processor in its surroundings

SHORT = {
    "type": "object",
    "properties": {
        "number": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["a", "b", "ö"]},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "text": {"type": "string", "maxLength": 4},
    },
    "required": ["number", "kind", "flags", "text"],
    "additionalProperties": False,
}
GENERATE: dict[str, Any] = {"max_new_tokens": 80, "eos_token_id": EOS, "pad_token_id": PAD}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(20240724)
    return models.ours_only(
        MistralLargeConfig(
            hidden_size=80,
            intermediate_size=112,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
        )
    )


@pytest.fixture
def prompts(tokenizer: MistralLargeTokenizer) -> Any:
    """Three prompts of different lengths, padded on the left."""
    conversations = [[{"role": "user", "content": text}] for text in ("One?", "Two or three words?", "[INST] {")]
    return tokenizer.apply_chat_template(conversations, padding=True, return_tensors="pt")


def answers_of(model: Any, inputs: Any, processors: Any, **options: Any) -> list[list[int]]:
    output = model.generate(**inputs, logits_processor=processors, **GENERATE, **options)
    rows = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.slow
@of_v3
def test_a_batch_gives_what_its_rows_give(tokenizer: MistralLargeTokenizer, model: Any, prompts: Any) -> None:
    processors = constrain(tokenizer, response_format=schema_format(SHORT))
    answers = answers_of(model, prompts, processors, do_sample=False)
    assert len({tuple(ids) for ids in answers}) > 1
    for row, ids in enumerate(answers):
        assert_json(tokenizer, ids, SHORT)
        is_prompt = prompts["attention_mask"][row].bool()
        single = {
            "input_ids": prompts["input_ids"][row][is_prompt][None],
            "attention_mask": torch.ones(1, int(is_prompt.sum())),
        }
        assert answers_of(model, single, processors, do_sample=False) == [ids]


@pytest.mark.slow
@of_v3
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "temperature": 2.0},
        {"do_sample": False, "num_beams": 4},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": False, "repetition_penalty": 3.0},
    ],
)
def test_every_way_to_generate(
    tokenizer: MistralLargeTokenizer, model: Any, prompts: Any, options: dict[str, Any]
) -> None:
    processors = constrain(tokenizer, response_format=schema_format(SHORT))
    for _ in range(2 if options["do_sample"] else 1):
        for ids in answers_of(model, prompts, processors, **options):
            assert_json(tokenizer, ids, SHORT)


@pytest.mark.slow
@of_v3
def test_beams_with_tool_calls(tokenizer: MistralLargeTokenizer, model: Any, prompts: Any) -> None:
    tools = [{"type": "function", "function": {"name": "short", "parameters": SHORT}}]
    processors = constrain(tokenizer, tools=tools, tool_choice="required", parallel_tool_calls=False)
    for ids in answers_of(model, prompts, processors, do_sample=False, num_beams=3):
        (call,) = json.loads(read_text(tokenizer, ids[1:-1]))
        validate(call["arguments"], SHORT)


@pytest.mark.slow
@of_v3
def test_assisted_generation_gives_the_same(tokenizer: MistralLargeTokenizer, model: Any) -> None:
    messages = [{"role": "user", "content": '{"number": 999, "kind": "ö", "flags": [true, false], "text": "x"}'}]
    prompt = tokenizer.apply_chat_template(messages, return_tensors="pt")
    processors = constrain(tokenizer, response_format=schema_format(SHORT))
    plain = answers_of(model, prompt, processors, do_sample=False)
    assert_json(tokenizer, plain[0], SHORT)
    assert answers_of(model, prompt, processors, do_sample=False, prompt_lookup_num_tokens=4) == plain


@pytest.mark.slow
def test_pipeline(tokenizer: MistralLargeTokenizer, model: Any) -> None:
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    processors = constrain(tokenizer, response_format=schema_format(SHORT))
    conversations = [[{"role": "user", "content": text}] for text in ("One?", "Two or three words?")]
    for output in generator(conversations, logits_processor=processors, max_new_tokens=80):
        answer = output[0]["generated_text"][-1]
        validate(json.loads(answer["content"]), SHORT)
    tools = [{"type": "function", "function": {"name": "short", "parameters": SHORT}}]
    processors = constrain(tokenizer, tools=tools, tool_choice="required", parallel_tool_calls=False)
    (output,) = generator(conversations[:1], logits_processor=processors, max_new_tokens=80)
    answer = output[0]["generated_text"][-1]
    validate(answer["tool_calls"][0]["function"]["arguments"], SHORT)


def test_the_prompt_may_hold_anything(tokenizer: MistralLargeTokenizer, write: Writer) -> None:
    processors = constrain(tokenizer, response_format=schema_format(SHORT))
    prompts = torch.tensor([[PAD, PAD, 1, 3, 9, 2, 5, 4], [1, 3, 760, 4, 5, 5, 2, 2]])
    for ids in write(processors, 0, prompts=prompts):
        assert_json(tokenizer, ids, SHORT)


@pytest.mark.slow
def test_one_constraint_serves_many_calls(tokenizer: MistralLargeTokenizer, write: Writer) -> None:
    processors = constrain(tokenizer, response_format=schema_format(SHORT))
    prompts = torch.tensor([PROMPT, [7, *PROMPT[1:]]])
    for seed in range(3):
        (answer, *_) = write(processors, seed, prompts=prompts)
        assert_json(tokenizer, answer, SHORT)
        # The next prompt begins with the last one and its answer, as in a chat; then a shorter one, in a longer batch.
        prompts = torch.tensor([[*prompts[0].tolist(), *answer, 3, 5000, END_INST]] * 2)
        for ids in write(processors, seed, prompts=prompts):
            assert_json(tokenizer, ids, SHORT)
        prompts = prompts[:1, :-3]
    for ids in write(processors, 9, rows=5):
        assert_json(tokenizer, ids, SHORT)


def test_a_prompt_that_begins_with_the_last_one_is_no_answer(tokenizer: MistralLargeTokenizer) -> None:
    processors = constrain(tokenizer, response_format={"type": "json_object"})
    first = step(processors, PROMPT)
    assert len(allowed(first[0])) > 1
    assert torch.equal(step(processors, [*PROMPT, 3, 5000, END_INST]), first)


def test_a_prompt_in_the_place_of_the_last_one_is_seen(tokenizer: MistralLargeTokenizer) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [12, 13]}}, "required": ["n"]}
    processors: Any = constrain(tokenizer, response_format=schema_format(schema), continue_final_message=True)
    ids = torch.tensor([[*PROMPT, *tokenizer.encode_texts(['{"n": 12'])[0]]])
    first = processors(ids, torch.zeros(1, 32768))
    ids[0] = torch.tensor([PAD, *PROMPT, *tokenizer.encode_texts(['{"n": 1'])[0]])
    second = processors(ids, torch.zeros(1, 32768))
    digits = [tokenizer.convert_tokens_to_ids(digit) for digit in "23"]
    assert first[0, digits].tolist() == [-torch.inf] * 2
    assert allowed(second[0]) == sorted(digits)


def test_rows_after_their_end_write_nothing_but_the_end(tokenizer: MistralLargeTokenizer) -> None:
    processors = constrain(tokenizer, response_format={"type": "json_object"})
    answer = [*tokenizer.encode_texts(["{}"])[0], EOS]
    other = tokenizer.encode_texts(['{"a": "'])[0]
    scores = torch.zeros(0)
    for length in range(len(answer) + 1):
        scores = step(processors, PROMPT + answer[:length], PROMPT + other[:length])
    assert allowed(scores[0]) == [EOS]
    assert scores[1, EOS] == -torch.inf


def test_the_final_message_is_continued(tokenizer: MistralLargeTokenizer, write: Writer) -> None:
    # There was another answer before.
    messages = [{"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello"))]
    messages += [{"role": "user", "content": "Data?"}, {"role": "assistant", "content": '{"number": 12, "ki'}]
    prompt = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    processors = constrain(tokenizer, response_format=schema_format(SHORT), continue_final_message=True)
    for ids in write(processors, 1, prompts=torch.tensor([prompt])):
        assert_json(tokenizer, [*tokenizer.encode_texts(['{"number": 12, "ki'])[0], *ids], SHORT)
    messages[3]["content"] = '{"kind": "a"'
    prompt = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    with raises_exactly(
        ConversationError,
        'the final message \'{"kind": "a"\': no response to this request begins so; JSON is continued as json.dumps '
        "writes it; leave the message or the constraint out",
    ):
        write(processors, 1, prompts=torch.tensor([prompt]))


@pytest.mark.slow
def test_a_message_after_a_system_message_is_continued(
    v7_tokenizer: MistralLargeTokenizer,
) -> None:
    """In v7 an answer may follow a system message."""
    for before in ([], [{"role": "user", "content": "Data?"}]):
        messages = [*before, {"role": "system", "content": "{"}, {"role": "assistant", "content": '{"number": 12, "ki'}]
        prompt = v7_tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
        processors = constrain(v7_tokenizer, response_format=schema_format(SHORT), continue_final_message=True)
        assert {v7_tokenizer.pieces[index] for index in allowed(step(processors, prompt)[0])} == {"n", "nd"}


def test_a_vocabulary_has_a_name() -> None:
    with raises_exactly(ConversationError, "vocabulary 'v9': it is one of v3, v7; pass `tokenizer.vocabulary.name`"):
        answer_grammar(vocabulary="v9")
    assert answer_grammar() == answer_grammar(vocabulary="v3") != answer_grammar(vocabulary="v7")


def test_a_model_with_more_rows_than_tokens_never_writes_them(tokenizer: MistralLargeTokenizer) -> None:
    processors = constrain(tokenizer)
    scores = step(processors, PROMPT, tokens=len(tokenizer) + 64)
    assert (scores[0, len(tokenizer) :] == -torch.inf).all()
    assert scores[0, 5000] == 0


def test_a_model_with_fewer_rows_than_tokens_is_refused(tokenizer: MistralLargeTokenizer) -> None:
    processors = constrain(tokenizer)
    with raises_exactly(
        CheckpointError,
        "the model has 768 tokens: the tokenizer has 32768; pass the tokenizer of the model",
    ):
        step(processors, PROMPT, tokens=768)


@pytest.mark.slow
def test_added_tokens(tokenizer_model_file: Any) -> None:
    own = MistralLargeTokenizer(vocab_file=str(tokenizer_model_file))
    constrain(own)
    own.add_tokens(["<word>"])
    own.add_special_tokens({"additional_special_tokens": ["<mark>"]})
    scores = step(constrain(own), PROMPT, tokens=len(own))
    assert scores[0, own.vocab["<word>"]] == 0
    assert scores[0, own.vocab["<mark>"]] == -torch.inf


@pytest.mark.slow
def test_servers_can_read_the_grammar(tokenizer: MistralLargeTokenizer) -> None:
    grammar = answer_grammar(tools=TOOLS, response_format=schema_format(SCHEMAS["references"]))
    vocabulary = from_tokenizer(tokenizer)
    matcher = llguidance.LLMatcher(vocabulary, llguidance.grammar_from("grammar", grammar))
    assert not matcher.is_error()
    ids = tokenizer.encode_texts(['[{"name": "ping", "arguments": {}}]'])[0]
    assert matcher.consume_tokens([TOOL_CALLS, *ids])
    assert matcher.is_accepting()


# Errors

ROUND = {"type": "array", "uniqueItems": True}


FORMAT_RULE = (
    'it is {"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": …}}; '
    "correct it"
)
GRAMMAR_RULE = (
    "output can be held to what the grammar library knows; simplify the schema, and check the rest in the response"
)
REQUIRED_RULE = "more than the required properties cannot be kept to; require them by name"
CHOICE_RULE = 'it is "none", "auto", "required" or {"type": "function", "function": {"name": …}}; correct it'


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        ({"response_format": {"type": "xml"}}, ConversationError, f"response_format {{'type': 'xml'}}: {FORMAT_RULE}"),
        ({"response_format": "json_object"}, ConversationError, f"response_format 'json_object': {FORMAT_RULE}"),
        (
            {"response_format": {"type": "json_schema"}},
            ConversationError,
            f"response_format {{'type': 'json_schema'}}: {FORMAT_RULE}",
        ),
        (
            {"response_format": {"type": "json_schema", "schema": {}}},
            ConversationError,
            f"response_format {{'type': 'json_schema', 'schema': {{}}}}: {FORMAT_RULE}",
        ),
        (
            {"response_format": schema_format({"type": "text"})},
            SchemaError,
            "response_format: schema.type: 'text' is not one of ['array', 'boolean', 'integer', 'null', 'number', "
            "'object', 'string']; correct the schema",
        ),
        (
            {"response_format": schema_format(ROUND)},
            SchemaError,
            f"response_format: <*>uniqueItems<*>; {GRAMMAR_RULE}",
        ),
        ({"response_format": schema_format({"not": {}})}, SchemaError, f'response_format: <*>"not"<*>; {GRAMMAR_RULE}'),
        (
            {"response_format": schema_format({**ROUND, "x-guidance": {"lenient": True}})},
            SchemaError,
            f"response_format: <*>uniqueItems<*>; {GRAMMAR_RULE}",
        ),
        ({"response_format": schema_format(False)}, SchemaError, f"response_format: Unsatisfiable <*>; {GRAMMAR_RULE}"),
        (
            {"response_format": schema_format({"pattern": "(?=a)"})},
            SchemaError,
            f"response_format: regex <*>; {GRAMMAR_RULE}",
        ),
        (
            {"response_format": schema_format({"$ref": "https://example.org/x"})},
            SchemaError,
            f"response_format: <*>'https://example.org/x'<*>; {GRAMMAR_RULE}",
        ),
        (
            {"response_format": schema_format({"const": {1, 2}})},
            SchemaError,
            "response_format: Object of type set is not JSON serializable; a schema is JSON; convert it",
        ),
        ({"response_format": schema_format({"const": "\ud800"})}, SchemaError, f"response_format: <*>; {GRAMMAR_RULE}"),
        (
            {"response_format": schema_format({"minProperties": 2})},
            SchemaError,
            f"response_format: minProperties 2; {REQUIRED_RULE}",
        ),
        (
            {"response_format": schema_format({"items": {"anyOf": [{"properties": {"a": {"minProperties": 3}}}]}})},
            SchemaError,
            f"response_format: minProperties 3; {REQUIRED_RULE}",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"properties": {"a": ROUND}}}}]},
            SchemaError,
            f"tool 'f': <*>uniqueItems<*>; {GRAMMAR_RULE}",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "string"}}}]},
            SchemaError,
            "tool 'f': parameters of type 'string'; arguments are an object; correct the type",
        ),
        (
            {"tools": [{"function": {"name": "f f"}}]},
            ConversationError,
            "tool 0: name 'f f'; a function name is 1 to 64 of a-z, A-Z, 0-9, _ and -; rename the function",
        ),
        (
            {"tools": [TOOLS[0], TOOLS[0]]},
            ConversationError,
            "tools: two are named 'pay'; a call must tell which; rename one",
        ),
        (
            {"tool_choice": "required"},
            ConversationError,
            "tool_choice 'required': there are no tools to call; pass tools",
        ),
        (
            {"tool_choice": named("f")},
            ConversationError,
            f"tool_choice {named('f')}: there are no tools to call; pass tools",
        ),
        ({"tools": TOOLS, "tool_choice": "always"}, ConversationError, f"tool_choice 'always': {CHOICE_RULE}"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "name": "pay"}},
            ConversationError,
            f"tool_choice {{'type': 'function', 'name': 'pay'}}: {CHOICE_RULE}",
        ),
        (
            {"tools": TOOLS, "tool_choice": named("payall")},
            ConversationError,
            "tool_choice 'payall': the tools are pay, pay-all, ping, odd\n, free, switch, get_weather; choose one of "
            "them",
        ),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            ConversationError,
            "tool_choice 'required' with response_format: a response that calls a tool is no JSON; leave one of the "
            "two out",
        ),
    ],
)
def test_what_cannot_be_kept_to_is_refused(
    tokenizer: MistralLargeTokenizer, request_: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=whole(message)):
        constrain(tokenizer, **request_)


@pytest.mark.slow
@of_v3
def test_a_schema_that_turns_out_too_large(tokenizer: MistralLargeTokenizer) -> None:
    schema = {"type": "object", "properties": {f"a{number}": {"type": "null"} for number in range(2100)}}
    processors = constrain(tokenizer, response_format=schema_format(schema))
    step(processors, PROMPT)
    begun = PROMPT + tokenizer.encode_texts(['{"'])[0]
    with pytest.raises(
        SchemaError, match=r"^the grammar cannot be followed \(.*\); simplify the schema, or pass fewer tools$"
    ):
        step(processors, begun)


def test_without_the_library(tokenizer: MistralLargeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with raises_exactly(
        MissingLibraryError,
        "structured output: llguidance is not installed; it holds the model to the grammar; run pip install "
        "'modeling-mistral-large[structured]'",
    ):
        constrain(tokenizer)


def test_nothing_the_caller_passed_is_changed(tokenizer: MistralLargeTokenizer) -> None:
    before = json.dumps([TOOLS[:-1], SCHEMAS])
    constrain(tokenizer, tools=TOOLS, response_format=schema_format(SCHEMAS["strings"]))
    assert json.dumps([TOOLS[:-1], SCHEMAS]) == before
