"""Tool call ids, the answer parser whole and streamed, and the response template.

MISTRAL_LARGE_MUTATIONS=1000000 pytest tests/modeling/instruct/test_tool_calls.py -k mutated parses that
many broken answers.
"""

import json
import os
import random
import re
import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_parsing import ResponseParser, parse_response

from mistral_large_conversion.chat_templates import RESPONSE_TEMPLATES
from mistral_large_conversion.vocabulary import join_pieces
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.instruct import answer as tool_calls
from modeling_mistral_large.instruct import call_list
from modeling_mistral_large.instruct.answer import AnswerStream, ParsedAnswer, TextEvent, ToolCallEvent, parse_answer
from modeling_mistral_large.instruct.messages import Message, ToolCall
from modeling_mistral_large.instruct.prompt import _call_ids
from modeling_mistral_large.instruct.tool_call_ids import is_tool_call_id, map_tool_call_ids, new_tool_call_id
from tests.modeling.instruct.conftest import BuildPrompt
from tests.support.conversations import EMPTY_CONTENTS, UNUSUAL_PIECES, conversations

MUTATIONS = int(os.environ.get("MISTRAL_LARGE_MUTATIONS", "2000"))

EOS_ID, TOOL_CALLS_ID = 2, 5
ID = re.compile("[A-Za-z0-9]{9}")


def rng() -> random.Random:
    return random.Random(2407)


def answer_ids(tokenizer: MistralLargeTokenizer, message: dict[str, Any]) -> list[int]:
    """Return what the model says in an assistant message, `</s>` included."""
    opening = {"role": "user", "content": "x"}
    prompt = tokenizer.apply_chat_template([opening], return_dict=False)
    ids: list[int] = tokenizer.apply_chat_template([opening, message], return_dict=False)
    return ids[len(prompt) :]


def put_together(events: list[Any]) -> tuple[str, list[dict[str, Any]]]:
    """Return the content and the tool calls of a stream's events."""
    content = "".join(event.text for event in events if isinstance(event, TextEvent))
    return content, [event.tool_call for event in events if isinstance(event, ToolCallEvent)]


def said(parsed: ParsedAnswer) -> tuple[str, list[dict[str, Any]]]:
    return parsed.message["content"], parsed.message.get("tool_calls", [])


# Ids


def test_new_ids_are_valid_and_follow_their_seed() -> None:
    ids = [new_tool_call_id() for _ in range(100)]
    assert all(ID.fullmatch(new) for new in ids)
    assert len(set(ids)) == 100
    assert [new_tool_call_id(random.Random(1)) for _ in range(2)] == ["i0VpEBOWf"] * 2
    source = random.Random(1)
    assert new_tool_call_id(source) != new_tool_call_id(source)


# Drawn in half the time of what `from_regex` draws.
LETTERS_AND_DIGITS = string.ascii_letters + string.digits
VALID_IDS = st.text(LETTERS_AND_DIGITS, min_size=9, max_size=9)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text("aB1_-é", max_size=12),
            VALID_IDS,
            st.tuples(st.text(max_size=2), VALID_IDS, st.text(max_size=2)).map("".join),
            st.integers(0, 3),
        ),
        max_size=12,
    )
)
def test_mapped_ids_are_valid_and_different(ids: list[Any]) -> None:
    mapped = map_tool_call_ids(ids)
    assert set(mapped) == set(ids)
    assert len(set(mapped.values())) == len(mapped)
    for given_id, new in mapped.items():
        assert is_tool_call_id(new)
        assert new == given_id or not (isinstance(given_id, str) and is_tool_call_id(given_id))
    assert map_tool_call_ids(ids) == mapped


def test_ids_that_collide_are_mapped_as_ever() -> None:
    def slowly(ids: list[Any]) -> dict[Any, str]:
        """Return the mapping by its definition, in time with the square of the ids."""
        mapped: dict[Any, str] = {}
        taken = {one for one in ids if isinstance(one, str) and is_tool_call_id(one)}
        for renamed, one in enumerate(dict.fromkeys(one for one in ids if one not in taken)):
            kept = re.sub("[^a-zA-Z0-9]", "", one)[-9:] if isinstance(one, str) else ""
            running = (str(number) for number in range(10**8 + renamed, 10**8 + renamed + len(ids) + 1))
            mapped[one] = kept if len(kept) == 9 and kept not in taken else next(n for n in running if n not in taken)
            taken.add(mapped[one])
        return {one: mapped.get(one, one) for one in ids}

    source = rng()
    for _ in range(300):
        choices: list[Any] = [
            *("abcdefghi", "y-abcdefghi", None, f"x{source.randrange(9)}", f"call_{source.randrange(10**8, 10**10)}"),
            *(str(10**8 + source.randrange(30)), source.randrange(9), f"x-{10**8 + source.randrange(9)}"),
        ]
        ids = [source.choice([*choices, str(10**8 + source.randrange(30))]) for _ in range(source.randrange(40))]
        assert map_tool_call_ids(ids) == slowly(ids)


def test_mapping_is_the_documented_one() -> None:
    ids = ["abcdefghi", "call_123456789xyz", "x-abcdefghi", "call_1", None, "call-123456789xyz"]
    # An id that comes again, as that of a call does on its result, keeps what it has.
    ids += ids[:5]
    assert list(map_tool_call_ids(ids).values()) == [
        *("abcdefghi", "456789xyz", "100000001", "100000002", "100000003", "100000004"),
    ]


# Whole answers

NAMES = st.text(LETTERS_AND_DIGITS + "_-", min_size=1, max_size=20)
# To SentencePiece, ▁ is a space.
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(UNUSUAL_PIECES), max_size=5).map("".join)).map(
    lambda text: text.replace("▁", " ")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
CALLS = st.builds(
    lambda name, arguments, call_id: {
        "type": "function",
        "id": call_id,
        "function": {"name": name, "arguments": arguments},
    },
    NAMES,
    st.dictionaries(TEXTS, VALUES, max_size=3),
    VALID_IDS,
)
ANSWERS = st.builds(
    lambda content, calls: (
        {"role": "assistant", "content": content.rstrip(" ")} | ({"tool_calls": calls} if calls else {})
    ),
    TEXTS,
    st.lists(CALLS, max_size=3, unique_by=lambda call: call["id"]),
).filter(lambda message: message["content"] or "tool_calls" in message)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)  # of each format
@given(message=ANSWERS)
def test_messages_survive_their_ids(tokenizer: MistralLargeTokenizer, message: dict[str, Any]) -> None:
    ids = answer_ids(tokenizer, message)
    parsed = parse_answer(ids, tokenizer.pieces)
    assert parsed == ParsedAnswer(message, None, is_finished=True)
    assert parsed.finish_reason == ("tool_calls" if "tool_calls" in message else "stop")
    assert answer_ids(tokenizer, parsed.message) == ids


@pytest.mark.slow
@settings(max_examples=100, deadline=None)  # of each format
@given(message=ANSWERS, data=st.data())
def test_any_cut_of_the_ids_gives_the_same(
    tokenizer: MistralLargeTokenizer, message: dict[str, Any], data: st.DataObject
) -> None:
    ids = answer_ids(tokenizer, message)
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    expected = parse_answer(ids, tokenizer.pieces, rng=rng())
    stream = AnswerStream(tokenizer.pieces, rng=rng())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    events = [stream.feed(ids[start:end]) for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert put_together([event for group in [*events, stream.finish()] for event in group]) == said(expected)
    assert stream.parsed == expected


# The text of an answer, the content and the (name, arguments) of the calls it is read as, and why not more of it.
TEXT_ANSWERS: dict[str, tuple[str, str, list[tuple[str, Any]], str | None]] = {
    "text": ("Hello. </s>", "Hello. ", [], None),
    "nothing": ("", "", [], None),
    "end only": ("</s>", "", [], None),
    "padding": ("Hello</s>[control_382][control_382]", "Hello", [], None),
    "spelled-out end": ("It is </s> that ends", "It is </s> that ends", [], None),
    "call": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1, {"b": "]}"}]}}]</s>',
        "",
        [("f", {"a": [1, {"b": "]}"}]})],
        None,
    ),
    "calls": ('[TOOL_CALLS][{"name":"f","arguments":{}},\n {"name":"g"}]\n</s>', "", [("f", {}), ("g", {})], None),
    "text and call": ('I look.\n[TOOL_CALLS] [{"name": "f", "arguments": null}]', "I look.\n", [("f", {})], None),
    "line break in a string": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x\ny"}}]',
        "",
        [("f", {"a": "x\ny"})],
        None,
    ),
    "marks in a string": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "[TOOL_CALLS] </s>"}}]</s>',
        "",
        [("f", {"a": "[TOOL_CALLS] </s>"})],
        None,
    ),
    "quoted arguments": ('[TOOL_CALLS] [{"name": "f", "arguments": "{\\"a\\": 1}"}]', "", [("f", {"a": 1})], None),
    "text arguments": ('[TOOL_CALLS] [{"name": "f", "arguments": "a b"}]', "", [("f", "a b")], None),
    "text arguments that look like JSON": ('[TOOL_CALLS] [{"name": "f", "arguments": "7"}]', "", [("f", '"7"')], None),
    "list arguments": ('[TOOL_CALLS] [{"name": "f", "arguments": [1, 2]}]', "", [("f", "[1, 2]")], None),
    "twice": ('[TOOL_CALLS] [{"name": "f"}][TOOL_CALLS] [{"name": "g"}]', "", [("f", {}), ("g", {})], None),
    "cut off": ('Hm[TOOL_CALLS] [{"name": "f", "ar', 'Hm[TOOL_CALLS] [{"name": "f", "ar', [], "cut off"),
    "cut off at the mark": ("Hm[TOOL_CALLS]", "Hm[TOOL_CALLS]", [], "cut off"),
    "cut off in the mark": ("Hm[TOOL_CALL", "Hm[TOOL_CALL", [], None),
    "cut off later": ('[TOOL_CALLS] [{"name": "f"}, {"na', ', {"na', [("f", {})], "cut off"),
    "spelled-out mark": ("The [TOOL_CALLS] token.</s>", "The [TOOL_CALLS] token.", [], "not a JSON list"),
    "spelled-out mark and call": (
        'The [TOOL_CALLS] token [TOOL_CALLS] [{"name": "f"}]</s>',
        "The [TOOL_CALLS] token ",
        [("f", {})],
        "not a JSON list",
    ),
    "empty list": ("[TOOL_CALLS] []", "[TOOL_CALLS] []", [], "not a JSON list"),
    "no list": ('[TOOL_CALLS] {"name": "f"}', '[TOOL_CALLS] {"name": "f"}', [], "not a JSON list"),
    "list of texts": ('[TOOL_CALLS] ["f"]', '[TOOL_CALLS] ["f"]', [], "not a JSON list"),
    "no name": (
        '[TOOL_CALLS] [{"arguments": {}}]',
        '[TOOL_CALLS] [{"arguments": {}}]',
        [],
        "not an object with a name",
    ),
    "no JSON": ('[TOOL_CALLS] [{"name": f}]', '[TOOL_CALLS] [{"name": f}]', [], "not an object with a name"),
    "surrogate": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "\\ud800"}}]',
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "\\ud800"}}]',
        [],
        "not an object with a name",
    ),
    "escapes": ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": "\\ud83c\\udf89"}}]', "", [("f", {"a": "🎉"})], None),
    "digits without end": (
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {"1" * 5000}}}]',
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {"1" * 5000}}}]',
        [],
        "not an object with a name",
    ),
    "brackets without end": (
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {"[" * 100_000}{"]" * 100_000}}}]',
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {"[" * 100_000}{"]" * 100_000}}}]',
        [],
        "not an object with a name",
    ),
    "one good call": ('[TOOL_CALLS] [{"name": "f"}, 3]', ", 3]", [("f", {})], "not a JSON list"),
    "text after calls": ('[TOOL_CALLS] [{"name": "f"}] Done.</s>', " Done.", [("f", {})], "text after"),
}


@pytest.mark.parametrize(
    ("answer", "content", "calls", "problem"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (len(case[0]) >= 1000))
        for name, case in TEXT_ANSWERS.items()
    ],
)
def test_text_is_read(answer: str, content: str, calls: list[Any], problem: str | None) -> None:
    parsed = parse_answer(answer)
    found = parsed.message.get("tool_calls", [])
    assert parsed.message["content"] == content
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in found] == calls
    assert all(ID.fullmatch(call["id"]) for call in found)
    assert parsed.problem is None if problem is None else problem in (parsed.problem or "")
    assert parsed.is_finished == bool(re.search(r"</s>(\[control_382\])*$", answer))
    assert parsed.finish_reason == ("length" if not parsed.is_finished else "tool_calls" if calls else "stop")


@pytest.mark.parametrize("answer", [row[0] for row in TEXT_ANSWERS.values() if len(row[0]) < 1000])
def test_any_cut_of_the_text_gives_the_same(answer: str) -> None:
    expected = parse_answer(answer, rng=rng())
    parts = [[answer[:cut], answer[cut:]] for cut in range(len(answer) + 1)]
    for cut in [*parts, list(answer)]:
        stream = AnswerStream(rng=rng())
        events = [event for part in cut for event in stream.feed(part)]
        assert put_together(events + stream.finish()) == said(expected)
        assert stream.parsed == expected


END = re.compile(r"</s>(?:</s>|\[control_\d{1,3}\])*\Z")


def read_slowly(text: str) -> tuple[str, list[str], str | None, bool]:
    """Return content, names of the calls, problem and whether a text is finished, by the definition of how it is read.

    What is given up is read again from the mark on, so that the time grows with the square of the length.
    """
    names: list[str] = []
    content, problem, is_after_calls = "", None, False
    while True:
        said, mark, rest = text.partition("[TOOL_CALLS]")
        end = None if mark else END.search(said)
        said = said[: end.start()] if end else said
        if is_after_calls and not said.strip(" \t\n\r"):
            said = ""
        elif is_after_calls:
            problem = problem or "there is text after the tool calls"
        content += said
        if not mark:
            return content, names, problem, end is not None
        found, reason, text = read_list_slowly(rest)
        names += found
        is_after_calls = reason is None
        problem = problem or reason
        if reason and not found:
            content += "[TOOL_CALLS]"


def read_list_slowly(text: str) -> tuple[list[str], str | None, str]:
    """Return the names of the calls in a list, why not more of it, and what of the text is unread."""
    names: list[str] = []
    unread, expected = text, "["
    position = 0
    while position < len(unread):
        character = unread[position]
        if character in " \t\n\r":
            position += 1
        elif character not in expected:
            return names, "the tool calls are not a JSON list of objects", unread
        elif character == "]":
            return names, None, unread[position + 1 :]
        elif character in "[,":
            position, expected = position + 1, "{"
        else:
            end = position + 1
            depth, is_string = 1, False
            while end < len(unread) and depth > 0:
                if is_string and unread[end] == "\\":
                    end += 1
                elif unread[end] == '"':
                    is_string = not is_string
                elif not is_string:
                    depth += (unread[end] in "{[") - (unread[end] in "}]")
                end += 1
            if depth > 0:
                break
            try:
                call = json.loads(unread[position:end], strict=False)
            except ValueError:
                call = None
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return names, "a tool call is not an object with a name and arguments", unread
            names.append(call["name"])
            unread, position, expected = unread[end:], 0, ",]"
    return names, "the tool calls are cut off", unread


MARKED_PIECES = (
    *("[TOOL_CALLS]", " [{", "[{", '{"name": "f", "arguments": {}}', '{"name": "f"}', ", ", "]", "}", '"', "\\"),
    *('\\"', " ", "\n", "x", "T", "</s>", "[control_382]", "[control_1", "<", "[", "</", '"a": 1', "}]", "[TOOL_"),
    *("CALLS]", ":", '{"name": "', '",":":"', "true", '"arguments": "[TOOL_CALLS] [{', "s>", "</s></s>", "{}"),
)


def test_any_text_is_read_as_defined() -> None:
    """Marks in every place, given up or not, whole and cut: the same as when all of it is read again each time."""
    source = rng()
    for _ in range(MUTATIONS):
        text = "".join(source.choices(MARKED_PIECES, k=source.choice((1, 3, 6, 12, 25, 60))))
        content, names, problem, is_finished = read_slowly(text)
        cuts = sorted(source.choices(range(len(text) + 1), k=source.choice((0, 1, 3))))
        stream = AnswerStream(rng=rng())
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            stream.feed(text[start:end])
        stream.finish()
        parsed = stream.parsed
        found = [call["function"]["name"] for call in parsed.message.get("tool_calls", [])]
        assert (parsed.message["content"], found) == (content, names), text
        assert (parsed.problem, parsed.is_finished) == (problem, is_finished), text


# Texts of any length whose reading could take time with the square of it.
REPEATED: dict[str, Callable[[int], str]] = {
    "marks": lambda count: "[TOOL_CALLS] [{" * count,
    "marks that end": lambda count: "[TOOL_CALLS] [{" * count + "}]" * count,
    "marks in strings": lambda count: '[TOOL_CALLS] [{"a":"' * count,
    "strings in turn": lambda count: '[TOOL_CALLS] [{"a":"' + '[TOOL_CALLS] [{",":":"' * count,
    "marks in a string": lambda count: '[TOOL_CALLS] [{"a":"' + "[TOOL_CALLS] [{" * count + '"}]',
    "bare marks": lambda count: "[TOOL_CALLS]" * count,
    "ends": lambda count: "</s>" * count + "x",
    "padding": lambda count: "</s>" + "[control_382]" * count + "x",
    "digits": lambda count: "</s>[control_" + "1" * count,
    "calls": lambda count: "[TOOL_CALLS] [" + '{"name":"f"},' * count,
    "lists": lambda count: '[TOOL_CALLS] [{"name":"f"}]' * count,
    "space after calls": lambda count: '[TOOL_CALLS] [{"name":"f"}]' + " " * count,
    "space in calls": lambda count: "[TOOL_CALLS] [" + " " * count,
    "arguments": lambda count: '[TOOL_CALLS] [{"name":"f","arguments":{"a":"' + "x" * count,
    "brackets": lambda count: "[TOOL_CALLS] [{" + "[" * count,
}


class Scan:
    """Counts the characters that a pattern or a list walks over, and those that are copied."""

    def __init__(self) -> None:
        self.characters = 0

    def pattern(self, given: re.Pattern[str]) -> Any:
        scan = self

        class Counting:
            def search(self, text: str, position: int = 0) -> re.Match[str] | None:
                found = given.search(text, position)
                scan.characters += (found.end() if found else len(text)) - position
                return found

        return Counting()

    def copies(self, of: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        given = getattr(of, name)

        def counting(this: Any, *arguments: Any) -> Any:
            parts = len(this._open_list.parts) if name == "_give_up" else 0
            result = given(this, *arguments)
            self.characters += len(result[0]) if parts else len(arguments[0] or "") if name == "keep" else 0
            return result

        monkeypatch.setattr(of, name, counting)


@pytest.mark.slow
@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("name", REPEATED)
def test_reading_is_linear(name: str, is_streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the characters that are looked at and copied, at most a few times each."""
    scan = Scan()
    brace = scan.pattern(call_list.BRACE)
    monkeypatch.setattr(tool_calls, "BRACE", brace)
    monkeypatch.setattr(call_list, "BRACE", brace)
    for module, patterns in (
        (tool_calls, ("_MARKER", "_BEGUN_MARKER")),
        (call_list, ("BRACE_OR_NO_JSON", "_IN_STRING")),
    ):
        for pattern in patterns:
            monkeypatch.setattr(module, pattern, scan.pattern(getattr(module, pattern)))
    scan.copies(AnswerStream, "_give_up", monkeypatch)
    scan.copies(call_list.CallList, "keep", monkeypatch)
    text = REPEATED[name](2000)
    stream = AnswerStream()
    for part in text if is_streamed else [text]:
        stream.feed(part)
    stream.finish()
    # The end of a text is looked at up to the length of a mark.
    assert scan.characters < (20 if is_streamed else 6) * len(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", REPEATED)
def test_long_answers_are_read(name: str) -> None:
    """Of a length at which the square would be hours."""
    text = REPEATED[name](20_000)
    message = parse_answer(text).message
    if "tool_calls" not in message and not text.endswith("</s>"):
        assert message["content"] == text


@pytest.mark.slow
def test_colliding_ids_are_mapped_in_linear_time() -> None:
    """Of a number at which the square would be hours."""
    ids = [str(10**8 + number) for number in range(50_000)]
    mapped = map_tool_call_ids([*ids, *(f"x{number}" for number in range(50_000))])
    assert len(set(mapped.values())) == 100_000


class Counted(str):
    """An id that counts how often it is compared."""

    comparisons = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.comparisons += 1
        return str.__eq__(self, other)


def test_calls_without_ids_are_paired_in_linear_time() -> None:
    calls = [ToolCall("f", "{}", None)] * 1000
    results = [Message(number, "tool", has_content=True, given_id=Counted(f"call_{number}")) for number in range(1000)]
    assert _call_ids(0, calls, results) == [f"call_{number}" for number in range(1000)]
    assert Counted.comparisons < 10_000


def test_text_is_streamed_at_once() -> None:
    stream = AnswerStream()
    assert stream.feed("Hello [") == [TextEvent("Hello ")]
    assert stream.feed("TOOL_") == []
    assert stream.feed("BOX] <") == [TextEvent("[TOOL_BOX] ")]
    assert stream.feed("b>") == [TextEvent("<b>")]


def test_calls_are_streamed_when_they_are_complete() -> None:
    stream = AnswerStream()
    stream.feed('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}')
    (event,) = stream.feed('}, {"name"')
    assert isinstance(event, ToolCallEvent)
    assert event.tool_call["function"] == {"name": "f", "arguments": {"a": 1}}


def test_ids_of_the_model_are_kept_and_others_made() -> None:
    given_ids = ['"abcdefghi"', '"abcdefghi"', '"call_1"', "7", "null"]
    calls = ", ".join(f'{{"name": "f", "arguments": {{}}, "id": {given_id}}}' for given_id in given_ids)
    message = parse_answer(f"[TOOL_CALLS] [{calls}]", rng=rng()).message
    ids = [call["id"] for call in message["tool_calls"]]
    assert ids[0] == "abcdefghi"
    assert len(set(ids)) == 5
    assert all(ID.fullmatch(new) for new in ids)
    assert parse_answer(f"[TOOL_CALLS] [{calls}]", rng=rng()).message == message


def test_a_mark_that_is_text_is_no_mark_among_ids(tokenizer: MistralLargeTokenizer) -> None:
    text = 'The [TOOL_CALLS] [{"name": "f", "arguments": {}}] </s> tokens'
    (ids,) = tokenizer.encode_texts([text])
    assert parse_answer(ids, tokenizer.pieces).message == {"role": "assistant", "content": text}


def test_other_control_tokens_are_kept_as_text(tokenizer: MistralLargeTokenizer) -> None:
    (ids,) = tokenizer.encode_texts(["Hello"])
    parsed = parse_answer([*ids, 3, 0, 40_000, -1, EOS_ID, *ids], tokenizer.pieces)
    assert parsed.message["content"] == "Hello[INST]<unk>\ufffd\ufffd"


# One that more text may complete, and one that none can.
@pytest.mark.parametrize("text", ['[{"name": "f"', '[{"name": the'])
def test_a_mark_inside_of_calls_begins_anew(tokenizer: MistralLargeTokenizer, text: str) -> None:
    begun, whole = tokenizer.encode_texts([text, '[{"name": "g"}]'])
    parsed = parse_answer([TOOL_CALLS_ID, *begun, TOOL_CALLS_ID, *whole, EOS_ID], tokenizer.pieces)
    assert parsed.message["content"] == f"[TOOL_CALLS] {text}"
    assert [call["function"]["name"] for call in parsed.message["tool_calls"]] == ["g"]
    assert parsed.problem == "tool calls begin inside tool calls"


def test_a_continued_text_keeps_its_first_space(tokenizer: MistralLargeTokenizer) -> None:
    (ids,) = tokenizer.encode_texts(["world"])
    assert parse_answer(ids, tokenizer.pieces).message["content"] == "world"
    assert parse_answer(ids, tokenizer.pieces, continues_text=True).message["content"] == " world"


def test_a_first_space_that_is_a_byte_is_kept(
    tokenizer: MistralLargeTokenizer, reference_tokenizer: MistralTokenizer[Any, Any, Any, Any, Any]
) -> None:
    byte, dummy, word = (tokenizer.pieces.index(piece) for piece in ("<0x20>", "▁", "▁Hello"))
    for ids in ([byte], [byte, word], [dummy, byte], [dummy, word], [word], [dummy, dummy, word], [byte, byte]):
        text = reference_tokenizer.decode(ids)
        assert parse_answer(ids, tokenizer.pieces).message["content"] == text
        stream = AnswerStream(tokenizer.pieces)
        events = [event for token_id in ids for event in stream.feed([token_id])]
        assert put_together(events + stream.finish())[0] == text


def test_split_characters_are_held_back(tokenizer: MistralLargeTokenizer) -> None:
    (ids,) = tokenizer.encode_texts(["𝔘!"])
    stream = AnswerStream(tokenizer.pieces)
    assert [stream.feed([index]) for index in ids] == [[]] * (len(ids) - 2) + [[TextEvent("𝔘")], [TextEvent("!")]]
    broken = AnswerStream(tokenizer.pieces)
    assert put_together(broken.feed(ids[:-2]) + broken.finish())[0] == "\ufffd" * 3


@pytest.mark.slow
def test_mutated_answers_raise_nothing(prompt_format: str, tokenizer: MistralLargeTokenizer) -> None:
    """Whatever is done to an answer: no exception, no character lost, and the same events for any cut."""
    source = rng()
    answers = [
        answer_ids(tokenizer, message)
        for conversation in conversations("adversarial", prompt_format=prompt_format, seed=31, count=60)
        for message in conversation.messages
        if message["role"] == "assistant" and (message.get("tool_calls") or message["content"] not in EMPTY_CONTENTS)
    ]
    for number in range(MUTATIONS):
        ids = list(source.choice(answers))[:400]
        for _ in range(source.choice((1, 2, 5))):
            place = source.randrange(len(ids) + 1)
            match source.randrange(5):
                case 0:
                    del ids[place : place + source.choice((1, 3, 20))]
                case 1:
                    ids.insert(place, source.choice((EOS_ID, TOOL_CALLS_ID, 3, source.randrange(32768), 10**6)))
                case 2:
                    ids[place:place] = ids[source.randrange(len(ids) + 1) :][:30]
                case 3:
                    ids = ids[:place]
                case _:
                    source.shuffle(ids)
        parsed = parse_answer(ids, tokenizer.pieces, rng=random.Random(number))
        stream = AnswerStream(tokenizer.pieces, rng=random.Random(number))
        place = source.randrange(len(ids) + 1)
        events = stream.feed(ids[:place]) + stream.feed(ids[place:]) + stream.finish()
        assert put_together(events) == said(parsed)
        if "tool_calls" not in parsed.message:
            end = ids.index(EOS_ID) if EOS_ID in ids else len(ids)
            pieces = [tokenizer.pieces[index] if index < 32768 else "\ufffd" for index in ids[:end]]
            assert parsed.message["content"] == join_pieces(pieces)


# The response template

WELL_FORMED = [
    name
    for name, (answer, *_) in TEXT_ANSWERS.items()
    # It differs where a call is not name, arguments and then any other keys, and gives arguments as they are written.
    if len(answer) < 1000
    and name
    not in {
        *("calls", "text and call", "line break in a string", "quoted arguments", "text arguments that look like JSON"),
        *(
            "surrogate",
            "list arguments",
            "twice",
            "cut off later",
            "spelled-out mark and call",
            "one good call",
            "text after calls",
        ),
    }
]
TEMPLATE_ANSWERS = {
    **{name: TEXT_ANSWERS[name][:3] for name in WELL_FORMED},
    "two calls": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "},{"}}, {"name": "g", "arguments": {}, "id": "a"}]</s>',
        "",
        [("f", {"a": "},{"}), ("g", {})],
    ),
    "text and three calls": (
        'x[TOOL_CALLS] [{"name":"f","arguments":{}},{"name":"g","arguments":[-1.5e3]} , {"name":"h","arguments":{}}]',
        "x",
        [("f", {}), ("g", [-1500.0]), ("h", {})],
    ),
    "one good call": ('[TOOL_CALLS] [{"name": "f", "arguments": {}}, 3]', ", 3]", [("f", {})]),
    "text after": ('[TOOL_CALLS] [{"name": "f", "arguments": {}}] Done.</s>', " Done.", [("f", {})]),
    "calls that are text": (
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</s>',
        '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]',
        [],
    ),
}


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name not in ("text", "two calls", "text after")))
        for name, case in TEMPLATE_ANSWERS.items()
    ],
)
def test_transformers_reads_answers_whole_and_streamed(
    prompt_format: str, answer: str, content: str, calls: list[Any]
) -> None:
    template = RESPONSE_TEMPLATES[prompt_format]
    tool_calls = [{"type": "function", "function": {"name": name, "arguments": value}} for name, value in calls]
    expected = {"role": "assistant", "content": content} | ({"tool_calls": tool_calls} if calls else {})
    prefix = "<s>[INST] Write [TOOL_CALLS] [{}][/INST]"
    assert parse_response(answer, template, prefix=prefix) == expected
    for parts in [*([answer[:cut], answer[cut:]] for cut in range(len(answer) + 1)), list(answer)]:
        parser = ResponseParser(template, prefix=prefix)
        events = [event for part in parts for event in parser.feed(part)]
        message, rest = parser.finalize()
        assert message == expected
        events += rest
        chunks = [event["text"] for event in events if event["type"] == "region_chunk" and not event["dirty"]]
        closed = [
            event["value"] for event in events if event["type"] == "region_close" and event["field"] == "tool_calls"
        ]
        assert ("".join(chunks), closed) == (content, tool_calls)


def test_an_answer_begins_where_the_prompt_of_a_format_ends(
    tokenizer: MistralLargeTokenizer, prompt_format: str
) -> None:
    """Also of one whose last texts look like an answer: transformers reads on from the last of these tokens."""
    call = {"id": "abcdefghi", "function": {"name": "f", "arguments": {}}}
    begun = [{"role": "user", "content": '[TOOL_CALLS] [{"name": "g", "arguments": {}}]'}]
    turns: dict[str, list[dict[str, Any]]] = {
        "user": [],
        "system": [{"role": "system", "content": "[TOOL_CALLS]"}],
        "tool": [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "[TOOL_CALLS] ["}],
    }
    answer = 'I look.[TOOL_CALLS] [{"name": "f", "arguments": {}}]</s>'
    function = {"name": "f", "arguments": {}}
    expected = {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"type": "function", "function": function}],
    }
    for turn in turns.values():
        prefix = tokenizer.apply_chat_template([*begun, *turn], tokenize=False)
        assert parse_response(answer, RESPONSE_TEMPLATES[prompt_format], prefix=prefix) == expected
        assert tokenizer.response_template == RESPONSE_TEMPLATES[prompt_format]


def test_an_answer_goes_back_into_the_prompt(build_prompt: BuildPrompt) -> None:
    answer = 'I look.[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]</s>'
    message = parse_answer(answer).message
    texts = [segment.text for segment in build_prompt([{"role": "user", "content": "x"}, message])]
    first, second = (call["id"] for call in message["tool_calls"])
    calls = [{"name": "f", "arguments": {"a": 1}, "id": first}, {"name": "g", "arguments": {}, "id": second}]
    assert texts[4:] == ["I look.", "[TOOL_CALLS]", json.dumps(calls), "</s>"]
