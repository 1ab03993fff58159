"""Seeded random conversations, and what the reference makes of them.

    for conversation in conversations("unusual", seed=7, count=1000): …

The kinds are `plain` (ASCII prose and code), `unusual` (runs of space, control characters, Unicode of every sort, text
that looks like JSON) and `adversarial` (unusual, with control strings in every place). Those of the v7 format also have
what its reference takes and that of v3 refuses.
"""

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, FinetuningAssistantMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

Kind: TypeAlias = Literal["plain", "unusual", "adversarial"]
Message: TypeAlias = dict[str, Any]

KINDS: tuple[Kind, ...] = ("plain", "unusual", "adversarial")
# What the generators are seeded with: another text would draw other conversations.
_SEEDS: dict[Kind, str] = {"plain": "plain", "unusual": "nasty", "adversarial": "hostile"}

_CONTROL_TEXT = (
    "<unk> <s> </s> [INST] [/INST] [TOOL_CALLS] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
    "[IMG] [PREFIX] [MIDDLE] [SUFFIX] [control_12] [control_382] [control_748] [REFERENCE_DOC_0] [REFERENCE_DOC_19] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT] [IMG_BREAK] [REF] [/REF]"
)
CONTROL_STRINGS = _CONTROL_TEXT.split()

_PROSE = (
    "the window cleaner asks what weather it is in Paris and who pays for a new pair of boots when rain falls on "
    "Monday; she says: yes, no, maybe (it depends), 42 times 3.14 = 131.88! return x[i] += 1 # done if a < b: "
    'print("done") {"key": [1, 2]} https://example.org/a?b=c&d=e user@example.org 100% C:\\temp\\new <b>bold</b> \'q\''
)
WORDS = _PROSE.split()

UNUSUAL_PIECES = (
    *(" ", "  ", "   ", " " * 7, " " * 15, " " * 16, " " * 17, " " * 40),
    *("\n", "\n\n", "\r\n", "\t", "\t\t", "\x00", "\x01", "\x08", "\x0b", "\x0c", "\x1b", "\x1f", "\x7f", "\x85"),
    *("\u00a0", "\u2028", "\u2029", "\u200b", "\u200d", "\u202e", "\ufeff", "\ufffd", "\uffff", "\u3000", "▁", "▁▁"),
    *("é", "e\u0301", "ß", "ﬁ", "Ⅷ", "ｆｕｌｌ", "中文", "日本語", "한국어", "עברית", "العربية", "हिन्दी", "ไทย"),
    *("🎉", "👩\u200d👩\u200d👧", "🇫🇷", "𝔘𝔫𝔦", "\U0010ffff", "a\u0300\u0301\u0302"),
    *('"', "'", "\\", "\\\\", "\\n", '\\"', "/", "\\/", "<", ">", "&", "&amp;", "{", "}", "[", "]", ":", ",", "``"),
    *('{"a": 1}', "[1, 2]", "{}", "null", "true", "22", "-0.5", "1e5", "NaN", '"text"', "{{ messages }}", "{% x %}"),
)

JSON_TEXTS = (
    *("{}", "[]", "null", "true", "false", "0", "-0", "22", " 22 ", "007", "22.5", "19.90", "-3.0", "1e5", "1E400"),
    *("-1e400", "NaN", "-Infinity", "1" + "0" * 400, "0.1e-400", "12345678901234567890", "1_000", '"text"', '"a\\n"'),
    *('{"a": 1}', '{"a":1,"b":[1,2]}', '{ "a" : 1 }', '{"a": 1, "a": 2}', '{"a": 1.0, "b": 1.50}', '["\\u00e9"]'),
    *('{"é": "\\u00e9\\ud83c\\udf89"}', '{"a": "<b>&\'"}', '{\n  "a": [\n    1\n  ]\n}', '{"a": "x\\/y"}', "[1 2 3]"),
    *("{'a': 1}", '{"a": 1', '{"a": 1}}', "[1,]", "{a: 1}", '{"a": "\t"}', '{"a": "\\q"}', "\ufeff{}", "tru", "--1"),
    *('{"": {}}', '[[], [[]], {"a": []}]', '[true, false, null, "true"]', '{"a": "b: c, d"}', '{"a": "\\\\\\""}'),
)


EMPTY_CONTENTS: tuple[Any, ...] = (None, "", [], [{"type": "text", "text": ""}])


@dataclass(frozen=True, slots=True)
class Conversation:
    """OpenAI-shaped messages and tools, as `apply_chat_template` takes them."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    continue_final_message: bool = False


def conversations(
    kind: Kind, seed: int, count: int, *, is_simple: bool = False, prompt_format: str = "v3"
) -> Iterator[Conversation]:
    """Yield conversations the reference of a format accepts.

    is_simple: arguments are dicts, and results are prose: what a Jinja template can render without parsing JSON.
    """
    for number in range(count):
        rng = random.Random(f"{_SEEDS[kind]} {seed} {number}")
        yield _Maker(kind, rng, is_simple=is_simple, prompt_format=prompt_format).conversation()


def invalid_conversations(kind: Kind, seed: int, count: int, *, prompt_format: str = "v3") -> Iterator[Conversation]:
    """Yield conversations with one or two random mistakes; the reference refuses most of them."""
    for number, conversation in enumerate(conversations(kind, seed, count, prompt_format=prompt_format)):
        rng = random.Random(f"mistake {_SEEDS[kind]} {seed} {number}")
        for _ in range(rng.choice((1, 1, 2))):
            conversation = _make_mistake(conversation, rng)
        yield conversation


def reference_request(conversation: Conversation) -> ChatCompletionRequest[Any]:
    """Return the conversation in the reference's own classes; raises as they do."""
    request = ChatCompletionRequest.from_openai(
        messages=conversation.messages,
        tools=conversation.tools,
        continue_final_message=conversation.continue_final_message,
    )
    # The reference's reader of OpenAI messages leaves its own key out.
    for message, given in zip(request.messages, conversation.messages, strict=True):
        if isinstance(message, AssistantMessage) and given.get("prefix"):
            message.prefix = True
    return request


def reference_ids(reference: MistralTokenizer[Any, Any, Any, Any, Any], conversation: Conversation) -> list[int]:
    """Return the reference's prompt; raises as the reference does."""
    return _encoded(reference, reference_request(conversation))


def _encoded(reference: MistralTokenizer[Any, Any, Any, Any, Any], request: ChatCompletionRequest[Any]) -> list[int]:
    # The reference also decodes what it has encoded, which takes as long and is not asked for.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.instruct_tokenizer, "decode", lambda *_, **__: "")
        ids: list[int] = reference.encode_chat_completion(request).tokens
        return ids


def training_samples(kind: Kind, seed: int, count: int, *, prompt_format: str = "v3") -> Iterator[Conversation]:
    """Yield conversations that end with the assistant: with weights, and final calls without an id."""
    for number, conversation in enumerate(conversations(kind, seed, count, prompt_format=prompt_format)):
        rng = random.Random(f"sample {_SEEDS[kind]} {seed} {number}")
        maker = _Maker(kind, rng, is_simple=False, prompt_format=prompt_format)
        messages = deepcopy(conversation.messages)
        if messages[-1]["role"] != "assistant" or maker.chance(0.2):
            messages.append(maker.answer() if maker.chance(0.6) else maker.calls(maker.ids()))
        messages[-1].pop("prefix", None)
        for message in messages:
            if message["role"] == "assistant" and maker.chance(0.5):
                message["weight"] = maker.rng.choice((0, 1, None, 0.0, 1.0))
        for call in messages[-1].get("tool_calls") or ():
            if maker.chance(0.5):
                call["id"] = "null"
            elif maker.chance(0.5):
                del call["id"]
        yield Conversation(messages, conversation.tools)


def reference_sample_ids(reference: MistralTokenizer[Any, Any, Any, Any, Any], sample: Conversation) -> list[int]:
    """Return what a reference for fine-tuning trains on; raises as it does."""
    request = reference_request(sample)
    messages = [
        FinetuningAssistantMessage(
            content=message.content, tool_calls=message.tool_calls, prefix=message.prefix, weight=given.get("weight")
        )
        if isinstance(message, AssistantMessage)
        else message
        for message, given in zip(request.messages, sample.messages, strict=True)
    ]
    finetuning: ChatCompletionRequest[Any] = ChatCompletionRequest.model_construct(
        messages=messages, tools=request.tools, reasoning_effort=None
    )
    return _encoded(reference, finetuning)


class _Maker:
    """Draws one conversation."""

    def __init__(self, kind: Kind, rng: random.Random, *, is_simple: bool, prompt_format: str) -> None:
        self.kind = kind
        self.rng = rng
        self.is_simple = is_simple
        self.is_v7 = prompt_format == "v7"

    def conversation(self) -> Conversation:
        rng = self.rng
        messages: list[Message] = [self.system() for _ in range(rng.choice((0, 0, 1, 1, 2)))]
        if self.is_v7 and messages and self.chance(0.05):
            return Conversation(messages)
        if self.is_v7 and not messages and self.chance(0.1):
            # The reference does not count the calls of a first message.
            messages += [self.calls(self.ids()), self.answer()]
        elif self.chance(0.05):
            messages += self.calls_and_results() if messages and self.chance(0.5) else [self.answer()]
        for _ in range(rng.choice((1, 1, 2, 3))):
            messages += self.user_turn()
            for _ in range(rng.choice((0, 0, 1, 2))):
                messages += self.calls_and_results()
            messages += [self.answer() for _ in range(rng.choice((0, 1, 1, 1, 2)))]
            if self.is_v7 and messages[-1]["role"] == "assistant" and self.chance(0.1):
                empty = {"role": "assistant", "content": rng.choice(EMPTY_CONTENTS)}
                messages.insert(len(messages) - rng.choice((0, 1)), empty)
        continues = False
        match rng.choice(("user", "user", "results", "prefix", "continue", "system", "odd")):
            case "results":
                messages += [*self.user_turn(), *self.calls_and_results()]
            case "prefix":
                messages += [*self.user_turn(), {**self.answer(), "prefix": True}]
            case "continue":
                messages += [*self.user_turn(), self.answer() if self.chance(0.7) else self.calls(self.ids())]
                continues = True
            case "system":
                messages += [*self.user_turn(), self.system()]
            case "odd":
                # Calls without results, and results without calls, pass where no answer follows.
                messages += [*self.user_turn(), self.calls(self.ids())] if self.chance(0.5) else [self.answer()]
                messages += [self.result(call_id) for call_id in self.ids()] if self.chance(0.5) else self.user_turn()
            case _:
                messages += self.user_turn()
        return Conversation(messages, self.tools() if self.chance(0.5) else None, continues)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def ids(self) -> list[str]:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        return ["".join(self.rng.choices(letters, k=9)) for _ in range(self.rng.choice((1, 1, 2, 3)))]

    def name(self) -> str:
        if self.chance(0.1):
            return "".join(self.rng.choices("abcXYZ019_-", k=self.rng.choice((1, 2, 63, 64))))
        return self.rng.choice(("get_current_weather", "search", "f", "pay-bill", "null"))

    def text(self) -> str:
        rng = self.rng
        if self.kind == "plain":
            return " ".join(rng.choices(WORDS, k=rng.choice((1, 2, 5, 12, 30))))
        pieces = (*UNUSUAL_PIECES, *rng.choices(WORDS, k=20))
        if self.kind == "adversarial":
            control = rng.choice(CONTROL_STRINGS)
            broken = control[: rng.randrange(len(control))]
            pieces = (*pieces, *(control, f" {control} ", broken, f"{broken}{control}", control.lower()) * 8)
        text = "".join(rng.choices(pieces, k=rng.choice((1, 2, 4, 9, 20))))
        return text + rng.choice(("", "", " ", "   ", "\n", " \n ")) or "x"

    def content(self) -> Any:
        """Return text, or text chunks."""
        if self.chance(0.8):
            return self.text()
        chunks = [{"type": "text", "text": self.text()} for _ in range(self.rng.choice((1, 2, 3)))]
        if self.chance(0.3):
            chunks.insert(self.rng.randrange(len(chunks) + 1), {"type": "text", "text": ""})
        if self.chance(0.1):
            chunks[0]["cache_control"] = "ephemeral"
        return chunks

    def system(self) -> Message:
        content = self.content() if self.chance(0.9) else self.rng.choice(("", [], [{"type": "text", "text": ""}]))
        return {"role": self.rng.choice(("system", "system", "developer")), "content": content}

    def user(self) -> Message:
        message = {"role": "user", "content": self.content() if self.chance(0.95) else self.rng.choice(("", []))}
        return {**message, "name": "Ada"} if self.chance(0.1) else message

    def user_turn(self) -> list[Message]:
        messages = [self.user() for _ in range(self.rng.choice((1, 1, 1, 2, 3)))]
        if self.chance(0.15):
            messages.insert(self.rng.randrange(1, len(messages) + 1), self.system())
        return messages

    def answer(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content()}
        if self.chance(0.3):
            message["tool_calls"] = self.rng.choice((None, []))
        if self.chance(0.1):
            message |= {"refusal": None, "audio": None, "annotations": []}
        return message

    def calls(self, ids: list[str]) -> Message:
        message: Message = {"role": "assistant", "tool_calls": [self.call(call_id) for call_id in ids]}
        if self.is_v7 and self.chance(0.4):
            message["content"] = self.content()
        elif self.chance(0.7):
            message["content"] = self.rng.choice((None, "", []))
        return message

    def call(self, call_id: str) -> dict[str, Any]:
        function = {"name": self.name(), "arguments": self.arguments()}
        call: dict[str, Any] = {"id": call_id, "type": "function", "function": function}
        if self.chance(0.2):
            del call["type"]
        if self.chance(0.1):
            call["index"] = 0
        return call

    def arguments(self) -> Any:
        if self.is_simple or self.chance(0.5):
            return self.json_object(3)
        if self.chance(0.3):
            return self.rng.choice(("", None, *JSON_TEXTS))
        return self.rng.choice((json.dumps, _dump_unicode, _dump_compact, _dump_indented))(self.json_object(3))

    def calls_and_results(self) -> list[Message]:
        ids = self.ids()
        return [self.calls(ids), *(self.result(call_id) for call_id in self.rng.sample(ids, len(ids)))]

    def result(self, call_id: str) -> Message:
        message: Message = {"role": "tool", "tool_call_id": call_id, "content": self.result_content()}
        if self.chance(0.3):
            message["name"] = self.name()
        return message

    def result_content(self) -> Any:
        if self.is_simple:
            return self.text()
        if self.chance(0.4):
            return self.content()
        if self.chance(0.5):
            return self.rng.choice(("", *JSON_TEXTS))
        return self.rng.choice((json.dumps, _dump_unicode, _dump_compact, _dump_indented))(self.json_value(3))

    def json_object(self, depth: int) -> dict[Any, Any]:
        keys: list[Any] = [self.text() if self.chance(0.3) else self.rng.choice(("city", "unit", "x", "é"))]
        if not self.is_simple and self.chance(0.02):
            keys += [1, "1", True, None, 2.5]
        return {key: self.json_value(depth - 1) for key in keys * self.rng.choice((0, 1, 1, 2))}

    def json_value(self, depth: int) -> Any:
        rng = self.rng
        kind = rng.choice(("text", "text", "number", "word", "list", "object") if depth > 0 else ("text", "number"))
        match kind:
            case "number":
                numbers = (0, 1, -7, 22, 2.5, -0.0, 1e22, 1e-7, 10**30, 12345678901234567890)
                return rng.choice(numbers if self.kind == "plain" else (*numbers, 1e400, -1e400, 10**400))
            case "word":
                return rng.choice((None, True, False))
            case "list":
                return [self.json_value(depth - 1) for _ in range(rng.choice((0, 1, 2, 3)))]
            case "object":
                return self.json_object(depth)
            case _:
                return self.text()

    def tools(self) -> list[dict[str, Any]]:
        return [self.tool() for _ in range(self.rng.choice((0, 1, 1, 2, 3)))]

    def tool(self) -> dict[str, Any]:
        function: dict[str, Any] = {
            "name": self.name(),
            "description": self.text(),
            "parameters": self.schema(),
            "strict": True,
            "examples": ["x"],
        }
        for key in ("description", "parameters"):
            if self.chance(0.1):
                function[key] = None
        for key in ("description", "parameters", "strict", "examples"):
            if self.chance(0.3):
                del function[key]
        tool = {"type": "function", "function": self.shuffled(function), "cache_control": None}
        for key in ("type", "cache_control"):
            if self.chance(0.3):
                del tool[key]
        return self.shuffled(tool)

    def schema(self) -> dict[str, Any]:
        if self.chance(0.1):
            return {}
        properties = {
            self.text() if self.chance(0.3) else name: self.shuffled(
                {"type": self.rng.choice(("string", "integer", ["number", "null"])), "description": self.text()}
                | ({"enum": [self.text(), 1, None]} if self.chance(0.2) else {})
                | ({"default": self.json_value(2), "x-note": self.json_value(1)} if self.chance(0.2) else {})
            )
            for name in self.rng.sample(("location", "format", "days"), self.rng.choice((0, 1, 2, 3)))
        }
        return self.shuffled(
            {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        )

    def shuffled(self, table: dict[str, Any]) -> dict[str, Any]:
        keys = list(table)
        if self.chance(0.5):
            self.rng.shuffle(keys)
        return {key: table[key] for key in keys}


def _dump_unicode(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _dump_compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _dump_indented(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2)


Mistake: TypeAlias = Callable[[list[Message], random.Random], None]


def _any_message(messages: list[Message], rng: random.Random, *roles: str) -> Message:
    """Return one of the messages of these roles, or of all, or one that is thrown away."""
    return rng.choice([message for message in messages if not roles or message["role"] in roles] or [{}])


def _any_call(messages: list[Message], rng: random.Random) -> dict[str, Any]:
    calls = [
        call for message in messages if isinstance(message.get("tool_calls"), list) for call in message["tool_calls"]
    ]
    call: dict[str, Any] = rng.choice([call for call in calls if call and call.get("function")] or [{}])
    return call


def _set(key: str, *values: Any, roles: tuple[str, ...] = ()) -> Mistake:
    def mistake(messages: list[Message], rng: random.Random) -> None:
        _any_message(messages, rng, *roles)[key] = rng.choice(values)

    return mistake


def _drop(key: str, *roles: str) -> Mistake:
    def mistake(messages: list[Message], rng: random.Random) -> None:
        _any_message(messages, rng, *roles).pop(key, None)

    return mistake


def _set_in_call(key: str, *values: Any) -> Mistake:
    def mistake(messages: list[Message], rng: random.Random) -> None:
        _any_call(messages, rng)[key] = rng.choice(values)

    return mistake


def _set_in_function(key: str, *values: Any) -> Mistake:
    def mistake(messages: list[Message], rng: random.Random) -> None:
        function = _any_call(messages, rng).get("function")
        if isinstance(function, dict):
            function[key] = rng.choice(values)

    return mistake


def _swap(messages: list[Message], rng: random.Random) -> None:
    first, second = rng.randrange(len(messages)), rng.randrange(len(messages))
    messages[first], messages[second] = messages[second], messages[first]


def _remove(messages: list[Message], rng: random.Random) -> None:
    del messages[rng.randrange(len(messages))]


def _repeat(messages: list[Message], rng: random.Random) -> None:
    index = rng.randrange(len(messages))
    messages.insert(index, messages[index])


def _cut(messages: list[Message], rng: random.Random) -> None:
    del messages[rng.randrange(len(messages)) :]


def _behead(messages: list[Message], rng: random.Random) -> None:
    del messages[: rng.randrange(len(messages))]


def _insert_system(messages: list[Message], rng: random.Random) -> None:
    messages.insert(rng.randrange(len(messages) + 1), {"role": "system", "content": "be kind"})


_BAD_NAMES = ("", "a b", "a" * 65, "é", "f\n", "f\n\n", None, 7, "[INST]")
_BAD_IDS = ("", "null", "call_1", "abcdefgh", "abcdefghij", "abcdefgh_", "abcdefghi\n", None, "äbcdefghi")
_BAD_CONTENTS: tuple[Any, ...] = (
    None,
    7,
    {"type": "text", "text": "x"},
    ["text"],
    [{"text": "x"}],
    [{"type": "text"}],
    [{"type": "text", "text": None}],
    [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}],
    [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}],
    [{"type": "thinking", "thinking": "hm"}],
    [{"type": "refusal", "refusal": "no"}],
    [{"type": "text", "text": "x"}, None],
    "",
    [],
    [{"type": "text", "text": ""}],
    " ",
    "lone \ud800 surrogate",
)
_BAD_JSON = ("[" * 100_000, "1" * 5000, '"\\ud800"', '{"a": "\\udc00"}')

MISTAKES: tuple[Mistake, ...] = (
    *(_swap, _remove, _repeat, _cut, _behead, _insert_system),
    _set("role", "function", "", None, "System", "user", "assistant", "tool", "system"),
    _set("content", *_BAD_CONTENTS),
    _set("content", *_BAD_CONTENTS, roles=("assistant",)),
    _set("content", "both", [{"type": "text", "text": "both"}], roles=("assistant",)),
    _set("content", *_BAD_JSON, {"t": 22}, 22, True, roles=("tool",)),
    _drop("content"),
    _drop("tool_calls"),
    _set("prefix", True, False, None, 1, 0, roles=("assistant",)),
    _set("reasoning_content", "hm", None, roles=("assistant",)),
    _set("reasoning", "hm", None, roles=("assistant",)),
    _set("tool_calls", {}, "x", [None], [{}], [{"id": "abcdefghi"}], roles=("assistant",)),
    _set("tool_call_id", *_BAD_IDS, roles=("tool",)),
    _drop("tool_call_id", "tool"),
    _set("name", *_BAD_NAMES, roles=("tool",)),
    _set_in_call("id", *_BAD_IDS),
    _set_in_call("type", "retrieval", "", "function"),
    _set_in_call("function", {}, None, "f", {"name": "f"}, {"arguments": {}}),
    _set_in_function("name", *_BAD_NAMES),
    _set_in_function("arguments", [], [1], 7, True, 0.5, *_BAD_JSON, {"a": "\ud800"}, {"a": {1, 2}}),
)

# Right and wrong ones.
ODD_SCHEMAS: tuple[Any, ...] = (
    *([], "object", 7, True, {"type": "text"}, {"type": []}, {"type": ["string", "string"]}, {"type": None}),
    *(
        {"properties": []},
        {"properties": {"a": 1}},
        {"properties": {"a": {"type": "any"}}},
        {"properties": {"a": True}},
    ),
    *({"required": "a"}, {"required": ["a", "a"]}, {"required": [1]}, {"required": []}, {"enum": "a"}, {"enum": []}),
    *(
        {"enum": [1, 1]},
        {"minLength": -1},
        {"minLength": 1.0},
        {"minLength": 1.5},
        {"minLength": True},
        {"minimum": "0"},
    ),
    *(
        {"minimum": True},
        {"multipleOf": 0},
        {"multipleOf": 0.5},
        {"multipleOf": "1"},
        {"multipleOf": True},
        {"pattern": "("},
        {"pattern": "^a$"},
        {"pattern": 1},
    ),
    *({"patternProperties": 7}, {"patternProperties": ["^a"]}, {"anyOf": {"a": {}}}, {"anyOf": 7}, {"items": "x"}),
    *({"dependencies": 7}, {"dependencies": {"a": {"type": "x"}}}, {"definitions": {"a": 7}}, {"type": {"a": 1}}),
    *({"maxLength": "1"}, {"maxLength": None}, {"maxLength": 1e400}, {"pattern": None}, {"required": {"a": 1}}),
    *({"patternProperties": {"(": {}}}, {"patternProperties": {"^a": {}}}, {"patternProperties": {"^a": 1}}),
    *({"items": []}, {"items": [{}, True]}, {"items": {}}, {"items": 1}, {"items": [1]}, {"items": {"type": "x"}}),
    *({"additionalItems": 1}, {"additionalProperties": "no"}, {"additionalProperties": {"type": "x"}}, {"not": []}),
    *({"anyOf": []}, {"anyOf": [{}]}, {"anyOf": {}}, {"allOf": [1]}, {"oneOf": [{"type": "x"}]}, {"if": 1}),
    *({"definitions": []}, {"definitions": {"a": {"type": "x"}}}, {"$defs": {"a": {"type": "x"}}}, {"$ref": 1}),
    *({"dependencies": {"a": ["b"]}}, {"dependencies": {"a": ["b", "b"]}}, {"dependencies": {"a": {}}}),
    *({"dependencies": {"a": 1}}, {"dependencies": []}, {"title": 1}, {"description": None}, {"format": 1}),
    *({"const": None}, {"default": []}, {"examples": 1}, {"examples": [1]}, {"readOnly": 1}, {"writeOnly": 1}),
    *({"uniqueItems": 0}, {"contains": 1}, {"propertyNames": 1}, {"contentEncoding": 1}, {"$comment": 1}, {"x": {1}}),
    *({"$id": "not a uri"}, {"$schema": 7}, {"exclusiveMinimum": True}, {"maxItems": 10**30}, {"nullable": True}),
)

ODD_TOOLS: tuple[Any, ...] = (
    *({}, {"type": "function"}, {"type": "retrieval", "function": {"name": "f"}}, {"function": {}}, {"function": None}),
    *({"function": "f"}, {"type": None, "function": {"name": "f"}}, {"function": {"name": "f", "description": 7}}),
    *({"name": "f"}, {"type": "function", "name": "f", "parameters": {}}),
    *({"function": {"name": name}} for name in _BAD_NAMES),
    *({"function": {"name": "f", "parameters": schema}} for schema in ODD_SCHEMAS),
)


def _make_mistake(conversation: Conversation, rng: random.Random) -> Conversation:
    match rng.choice(("tool", "continue", "empty", *("message",) * 12)):
        case "tool":
            tools = [*(conversation.tools or []), rng.choice(ODD_TOOLS)]
            return Conversation(conversation.messages, tools, conversation.continue_final_message)
        case "continue":
            return Conversation(conversation.messages, conversation.tools, not conversation.continue_final_message)
        case "empty":
            return Conversation([], conversation.tools, conversation.continue_final_message)
    messages = deepcopy(conversation.messages)
    if messages:
        rng.choice(MISTAKES)(messages, rng)
    return Conversation(messages, conversation.tools, conversation.continue_final_message)
