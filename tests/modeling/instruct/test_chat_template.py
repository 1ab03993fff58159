"""The Jinja template without our Python: how near to the reference it is, and that every engine renders the same."""

import json
import string
from functools import cached_property
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from mistral_large_conversion.chat_templates import CHAT_TEMPLATES, PLAIN_CHAT_TEMPLATES
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.prompt import build_prompt
from tests.modeling.instruct.test_chat_prompts import (
    FOREIGN_IDS,
    LENIENT,
    REFUSED,
    assistant,
    call,
    calls,
    result,
    user,
)
from tests.support.conversations import (
    JSON_TEXTS,
    KINDS,
    Conversation,
    Kind,
    conversations,
    invalid_conversations,
    reference_ids,
)
from tests.support.errors import raises_exactly

Reference = MistralTokenizer[Any, Any, Any, Any, Any]


class Engines:
    """What renders the templates of a format, and the Python that they should equal."""

    def __init__(self, prompt_format: str) -> None:
        self.prompt_format = prompt_format
        self.template, self.plain_template = CHAT_TEMPLATES[prompt_format], PLAIN_CHAT_TEMPLATES[prompt_format]
        self._plain = jinja2.Environment().from_string(self.plain_template)

    @cached_property
    def _spaced(self) -> jinja2.Template:
        return ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        ).from_string(self.plain_template)

    @cached_property
    def _json(self) -> jinja2.Template:
        return jinja2.Environment().from_string(self.plain_template + "\0{{ json(value) }}")

    def plain(self, messages: Any, tools: Any = None) -> str:
        return self._plain.render(messages=messages, tools=tools)

    def spaced(self, messages: Any, tools: Any = None) -> str:
        return self._spaced.render(messages=messages, tools=tools)

    def transformers(self, messages: Any, tools: Any = None, **options: Any) -> str:
        rendered: Any = render_jinja_template([messages], tools, chat_template=self.template, **options)
        text: str = rendered[0][0]
        return text

    def python(self, messages: Any, tools: Any = None, **options: Any) -> str:
        parts = build_prompt(messages, tools, prompt_format=self.prompt_format, **options)
        return "".join(part.text if part.is_control or not part.text else f" {part.text}" for part in parts)

    def json(self, value: Any) -> str:
        return self._json.render(messages=[], value=value).partition("\0")[2]


@pytest.fixture(scope="session")
def engines(prompt_format: str) -> Engines:
    return Engines(prompt_format)


def as_prefix(conversation: Conversation) -> Conversation:
    """Return the conversation with `prefix` in place of `continue_final_message`."""
    if not conversation.continue_final_message or not conversation.messages:
        return conversation
    *messages, last = conversation.messages
    return Conversation([*messages, {**last, "prefix": True}], conversation.tools)


def test_the_plain_template_lacks_the_marks_only(engines: Engines) -> None:
    template, plain = engines.template, engines.plain_template
    assert "generation" in template
    assert "generation" not in plain
    assert template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "") == plain
    # It is one file: engines have no loader for another.
    assert "include" not in template


@pytest.mark.slow
@pytest.mark.parametrize("is_simple", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_renders_the_same(engines: Engines, kind: Kind, is_simple: bool) -> None:
    for conversation in map(
        as_prefix, conversations(kind, seed=21, count=25, prompt_format=engines.prompt_format, is_simple=is_simple)
    ):
        rendered = engines.plain(conversation.messages, conversation.tools)
        assert engines.spaced(conversation.messages, conversation.tools) == rendered
        assert engines.transformers(conversation.messages, conversation.tools) == rendered


# With arguments that are objects, results that are prose, and no control strings, the template should always be
# right; the other figures are what it is measured at, less the noise.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "is_simple", "share"),
    [("plain", True, 1.0), ("unusual", True, 0.99), ("plain", False, 0.9), ("unusual", False, 0.9)],
)
def test_how_often_the_ids_are_the_references(
    engines: Engines,
    tokenizer: MistralLargeTokenizer,
    reference_tokenizer: Reference,
    kind: Kind,
    is_simple: bool,
    share: float,
) -> None:
    count = 100
    same = sum(
        tokenizer.encode(engines.plain(drawn.messages, drawn.tools), add_special_tokens=False)
        == reference_ids(reference_tokenizer, drawn)
        for drawn in map(
            as_prefix,
            conversations(kind, seed=22, count=count, prompt_format=engines.prompt_format, is_simple=is_simple),
        )
    )
    assert same / count >= share


@pytest.mark.slow
def test_control_strings_change_no_text(engines: Engines, tokenizer: MistralLargeTokenizer) -> None:
    """A template cannot keep control strings from becoming control tokens; its text is right all the same."""
    for conversation in map(
        as_prefix, conversations("adversarial", seed=23, count=150, prompt_format=engines.prompt_format, is_simple=True)
    ):
        assert engines.plain(conversation.messages, conversation.tools) == engines.python(
            conversation.messages, conversation.tools
        )


@pytest.mark.parametrize(("called", "answered"), FOREIGN_IDS.values(), ids=FOREIGN_IDS)
def test_foreign_ids_are_mapped_as_in_python(engines: Engines, called: list[Any], answered: list[Any]) -> None:
    messages = [user(), calls(*called), *map(result, answered), user(), calls(*called), *map(result, answered)]
    assert engines.plain(messages) == engines.transformers(messages) == engines.python(messages)


ids = st.one_of(
    st.text("ab1_-é\n", max_size=12),
    st.text(string.ascii_letters + string.digits, min_size=9, max_size=9),
    st.sampled_from(["abcdefghi", "abcdefghi\n", "x-abcdefghi", "100000000", "100000001", "", "null", None]),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)  # of each format
@given(st.lists(st.lists(st.tuples(ids, ids), min_size=1, max_size=4), max_size=3))
def test_any_ids_are_mapped_as_in_python(engines: Engines, rounds: list[list[tuple[Any, Any]]]) -> None:
    messages = [user()]
    for pairs in rounds:
        messages += [calls(*(called for called, _ in pairs)), *(result(answered) for _, answered in pairs)]
    assert engines.plain(messages) == engines.python(messages)


@pytest.mark.parametrize(("messages", "plain"), [each[:2] for each in LENIENT.values()], ids=LENIENT)
def test_harmless_shapes_are_read(engines: Engines, messages: list[Any], plain: list[Any]) -> None:
    assert engines.plain(messages) == engines.transformers(messages) == engines.python(plain)


def test_text_beside_calls_is_kept(engines: Engines) -> None:
    messages = [user(), assistant("I look.", tool_calls=[call()]), result(), user()]
    assert engines.plain(messages) == engines.python(messages)


# What the template does not look at.
UNCHECKED = {
    *("prefix of another type", "text after calls", "chunk without text", "reasoning", "calls of another type"),
    *("no call", "call without a function", "call of another type", "name of a call", "arguments as a list"),
    *("arguments that are no JSON", "name of a result", "digits without end", "brackets without end", "surrogate"),
    *("surrogate in JSON", "no message", "nothing", "list as a role", "assistant alone", "tool alone"),
}


ROLES = "the roles are system, developer, user, assistant and tool"
NO_TEXT = "an assistant message needs content or tool_calls"
RESULTS = "every tool call needs one result before the next answer"
SAID = {
    "no role": f"message 0: {ROLES}",
    "unknown role": f"message 1: {ROLES}",
    "tool after user": "message 1: role tool cannot come after user",
    "tool after system": "message 1: role tool cannot come after system",
    "system after assistant": "message 2: role system cannot come after assistant",
    "system after tool": "message 3: role system cannot come after tool",
    "prefix in the middle": "message 1: only the last message can be a prefix",
    "empty answer": f"message 1: {NO_TEXT}",
    "no answer": f"message 1: {NO_TEXT}",
    "answer of empty chunks": f"message 1: {NO_TEXT}",
    "missing result": f"message 3: {RESULTS}",
    "missing call": f"message 4: {RESULTS}",
    "number as content": "message 0: this model reads text only",
    "image": "message 0: this model reads text only",
    "text as a chunk": "message 0: this model reads text only",
}


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in UNCHECKED])
def test_the_template_refuses_a_wrong_order(engines: Engines, name: str) -> None:
    messages, _ = REFUSED[name]
    with raises_exactly(jinja2.TemplateError, SAID[name]):
        engines.transformers(messages)
    with pytest.raises(jinja2.UndefinedError, match="raise_exception"):
        engines.plain(messages)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_python_takes_the_template_takes(engines: Engines, kind: Kind) -> None:
    for conversation in map(
        as_prefix, invalid_conversations(kind, seed=24, count=150, prompt_format=engines.prompt_format)
    ):
        try:
            engines.python(conversation.messages, conversation.tools)
        except ConversationError:
            continue
        # An older name of the role, which the template does not know.
        if any(message["role"] == "function" for message in conversation.messages):
            continue
        engines.transformers(conversation.messages, conversation.tools)


@pytest.mark.parametrize("text", ["Hello", "Hello  ", "```json\n", "a \n  ", " x", "  "])
def test_transformers_continues_the_final_message(engines: Engines, text: str) -> None:
    messages = [user(), assistant(text)]
    continued = engines.transformers(messages, continue_final_message=True)
    assert continued == engines.python(messages, continue_final_message=True)


def test_marks_are_what_the_assistant_says(engines: Engines) -> None:
    messages = [user(), assistant("One.", tool_calls=[call()]), result(), assistant("Two.")]
    rendered: Any = render_jinja_template([messages], chat_template=engines.template, return_assistant_tokens_mask=True)
    texts, spans = rendered
    assert [texts[0][start:end] for start, end in spans[0]] == [
        ' One.[TOOL_CALLS] [{"name": "f", "arguments": {}, "id": "abcdefghi"}]</s>',
        " Two.</s>",
    ]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)  # of each format
@given(values)
def test_json_is_written_as_python_writes_it(engines: Engines, value: Any) -> None:
    assert engines.json(value) == json.dumps(value, ensure_ascii=False)


# JSON that the template renders otherwise than the reference: it cannot parse, so numbers inside of lists and objects
# stay as they are written, equal keys stay too, and what looks like JSON may be taken for it.
NOT_EXACT = ('{"a": 1, "a": 2}', '{"a": 1.0, "b": 1.50}', "{a: 1}")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, marks=[pytest.mark.slow] * (number % 4 > 0))
        for number, text in enumerate(text for text in JSON_TEXTS if text not in NOT_EXACT)
    ],
)
def test_json_in_a_text_is_read(engines: Engines, text: str) -> None:
    messages = [user(), assistant(None, tool_calls=[call(arguments=text)]), result(content=text)]
    assert engines.plain(messages) == engines.python(messages)
