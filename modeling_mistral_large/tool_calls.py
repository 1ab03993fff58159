"""Tool calls: their 9-character ids, and the parser that turns the model's answer into a message."""

import codecs
import json
import random
import re
import string
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

EOS_ID, EOS_TEXT = 2, "</s>"
TOOL_CALLS_ID, TOOL_CALLS_TEXT = 5, "[TOOL_CALLS]"

ID_LENGTH = 9
ID_CHARACTERS = string.ascii_letters + string.digits
# The ids that stand for one that collides or is too short count up from here: always 9 digits.
FIRST_RUNNING_ID = 10 ** (ID_LENGTH - 1)

# The reference matches with `$`, which also lets one final newline through.
_VALID_ID = re.compile(r"[a-zA-Z0-9]{9}\n?")
_NOT_IN_ID = re.compile("[^a-zA-Z0-9]")


def new_tool_call_id(rng: random.Random | None = None) -> str:
    """Return 9 random letters and digits, from `rng` where ids must be reproducible."""
    return "".join((rng or random.SystemRandom()).choices(ID_CHARACTERS, k=ID_LENGTH))


def is_tool_call_id(text: str) -> bool:
    """Return whether the v3 format takes `text` as the id of a tool call."""
    return _VALID_ID.fullmatch(text) is not None


def map_tool_call_ids(ids: Iterable[Hashable]) -> dict[Hashable, str]:
    """Return the 9-character id of every id, in a way the Jinja template computes too.

    A valid id stays. Any other becomes its last 9 letters and digits, or a running number where it has fewer, where
    those are taken, and where there was no id at all (anything but a string stands for that). Never two to one.
    """
    ids = list(ids)
    mapped: dict[Hashable, str] = {}
    taken = {given for given in ids if isinstance(given, str) and is_tool_call_id(given)}
    renamed = 0
    for given in ids:
        if given in mapped:
            continue
        if isinstance(given, str) and is_tool_call_id(given):
            mapped[given] = given
            continue
        kept = _NOT_IN_ID.sub("", given)[-ID_LENGTH:] if isinstance(given, str) else ""
        if len(kept) < ID_LENGTH or kept in taken:
            running = map(str, count(FIRST_RUNNING_ID + renamed))
            kept = next(candidate for candidate in running if candidate not in taken)
        mapped[given] = kept
        taken.add(kept)
        renamed += 1
    return mapped


def _beginnings_of(text: str) -> str:
    """Return a pattern for every beginning of `text`, the empty one too."""
    pattern = ""
    for character in reversed(text):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return pattern


# In a text, the end of the answer is `</s>` and any padding; more text may still turn it into something else.
_EOS_AND_PADDING = r"</s>(?:</s>|\[control_\d+\])*"
_END = re.compile(rf"{_EOS_AND_PADDING}\Z")
_BEGUN_MARKER = rf"(?:{_beginnings_of(EOS_TEXT)}|{_beginnings_of(TOOL_CALLS_TEXT)}|{_beginnings_of('[control_')}\d*)"
_POSSIBLE_END = re.compile(rf"(?:{_EOS_AND_PADDING})?{_BEGUN_MARKER}\Z")

_BYTE_PIECES = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
_JSON_SPACE = " \t\n\r"
_IN_OBJECT = re.compile(r'["{}\[\]]')
_IN_STRING = re.compile(r'["\\]')
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class TextEvent:
    """Some more of what the assistant says."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEvent:
    """One complete tool call, in transformers' message form."""

    tool_call: dict[str, Any]


AnswerEvent: TypeAlias = TextEvent | ToolCallEvent


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """An answer as a message.

    message: `role`, `content` and, where there are calls, `tool_calls`. What is marked as tool calls but cannot be
        read is part of `content`: nothing the model wrote is lost.
    problem: why that was so, or None.
    is_finished: whether the model ended the answer with `</s>`.
    """

    message: dict[str, Any]
    problem: str | None
    is_finished: bool

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for how the answer ended."""
        if not self.is_finished:
            return "length"
        return "tool_calls" if "tool_calls" in self.message else "stop"


def parse_answer(
    answer: str | Iterable[int],
    vocabulary: Sequence[str] | None = None,
    *,
    continues_text: bool = False,
    rng: random.Random | None = None,
) -> ParsedAnswer:
    """Return the model's answer as a message; raises nothing, whatever the answer.

    answer: the ids after the prompt, or their text with the control tokens kept. Ids are exact; in a text, a
        `[TOOL_CALLS]` or final `</s>` that the model spelled out looks like the control token.
    vocabulary: the pieces by id, needed to read ids.
    continues_text: whether the prompt ended in the assistant's own text, so that a first space is the model's.
    rng: where the ids of calls without one come from.
    """
    stream = AnswerStream(vocabulary, continues_text=continues_text, rng=rng)
    stream.feed(answer)
    stream.finish()
    return stream.parsed


class AnswerStream:
    """Parser for an answer that arrives in pieces; its events put together are what `parse_answer` returns."""

    def __init__(
        self,
        vocabulary: Sequence[str] | None = None,
        *,
        continues_text: bool = False,
        rng: random.Random | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._rng = rng
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._is_start = not continues_text
        self._is_text = False
        self._held = ""  # may turn out to be a marker
        self._gap: str | None = None  # white space after tool calls
        self._open_list: _CallList | None = None
        self._events: list[AnswerEvent] = []
        self._content: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._problem: str | None = None
        self._is_finished = False

    def feed(self, part: str | Iterable[int]) -> list[AnswerEvent]:
        """Take the next text or ids and return what they complete."""
        if isinstance(part, str):
            self._is_text = True
            self._read(part)
        else:
            self._read_ids(part)
        return self._take_events()

    def finish(self) -> list[AnswerEvent]:
        """Take the end of the answer and return what was held back for it."""
        self._read(self._decode([], final=True))
        while self._open_list:
            self._read(self._give_up("the tool calls are cut off"))
        held, self._held = self._held, ""
        if end := _END.search(held):
            held, self._is_finished = held[: end.start()], True
        self._say(held)
        return self._take_events()

    @property
    def parsed(self) -> ParsedAnswer:
        """What was read, as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(self._content)}
        if self._tool_calls:
            message["tool_calls"] = self._tool_calls
        return ParsedAnswer(message, self._problem, self._is_finished)

    def _take_events(self) -> list[AnswerEvent]:
        events, self._events = self._events, []
        return events

    def _read_ids(self, ids: Iterable[int]) -> None:
        assert self._vocabulary is not None, "ids cannot be read without the vocabulary"
        pieces: list[bytes] = []
        for token_id in ids:
            if self._is_finished:
                break
            if token_id in (EOS_ID, TOOL_CALLS_ID):
                self._read(self._decode(pieces, final=True))
                pieces = []
                self._is_start = False
                if token_id == EOS_ID:
                    self._is_finished = True
                else:
                    self._begin_calls()
            else:
                piece = self._vocabulary[token_id] if 0 <= token_id < len(self._vocabulary) else "\ufffd"
                pieces.append(_BYTE_PIECES.get(piece) or piece.replace("▁", " ").encode())
        self._read(self._decode(pieces))

    def _decode(self, pieces: Iterable[bytes], *, final: bool = False) -> str:
        """Return the complete characters, and � for each byte that is not part of one, as SentencePiece does."""
        text = _SURROGATE.sub("\ufffd", self._utf8.decode(b"".join(pieces), final))
        if text and self._is_start:
            # The tokenizer puts a space before every text.
            text = text.removeprefix(" ")
            self._is_start = False
        return text

    def _read(self, text: str) -> None:
        while text:
            if self._open_list is None:
                text = self._read_content(text)
                continue
            calls, text = self._open_list.read(text)
            for call in calls:
                self._add_call(call)
            if self._open_list.problem:
                text = self._give_up(self._open_list.problem)
            elif self._open_list.is_closed:
                self._open_list = None
                self._gap = ""

    def _read_content(self, text: str) -> str:
        """Say the text up to a marker that is spelled out, and return what follows the marker."""
        if not self._is_text:
            self._say(text)
            return ""
        said, marker, rest = (self._held + text).partition(TOOL_CALLS_TEXT)
        if marker:
            self._held = ""
            self._say(said)
            self._begin_calls()
            return rest
        possible_end = _POSSIBLE_END.search(said)
        assert possible_end is not None, "the pattern matches the empty end"
        self._held = said[possible_end.start() :]
        self._say(said[: possible_end.start()])
        return ""

    def _begin_calls(self) -> None:
        if self._open_list:
            self._say(self._give_up("tool calls begin inside tool calls"))
        self._gap = None
        self._open_list = _CallList()

    def _add_call(self, call: dict[str, Any]) -> None:
        used = {other["id"] for other in self._tool_calls}
        call_id = call.pop("id")
        if not isinstance(call_id, str) or not is_tool_call_id(call_id):
            call_id = new_tool_call_id(self._rng)
        while call_id in used:
            call_id = new_tool_call_id(self._rng)
        tool_call = {"type": "function", "id": call_id, "function": call}
        self._tool_calls.append(tool_call)
        self._events.append(ToolCallEvent(tool_call))

    def _give_up(self, problem: str) -> str:
        """Leave the list of calls and return what of it is unread."""
        assert self._open_list is not None
        if not self._open_list.has_calls:
            self._say(TOOL_CALLS_TEXT)
        unread = self._open_list.unread
        self._open_list = None
        self._problem = self._problem or problem
        return unread

    def _say(self, text: str) -> None:
        if self._gap is not None:
            # White space between tool calls and the end is not something the assistant says.
            self._gap += text
            if not self._gap.strip(_JSON_SPACE):
                return
            text, self._gap = self._gap, None
            self._problem = self._problem or "there is text after the tool calls"
        if text:
            self._content.append(text)
            self._events.append(TextEvent(text))


class _CallList:
    """A JSON list of tool calls that arrives in pieces.

    unread: the text since the last complete call.
    problem: why reading stopped before the end of the list, or None.
    """

    def __init__(self) -> None:
        self.unread = ""
        self.has_calls = False
        self.is_closed = False
        self.problem: str | None = None
        self._position = 0  # in `unread`
        self._call_start = 0
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
        self._expected = "["

    def read(self, text: str) -> tuple[list[dict[str, Any]], str]:
        """Return the calls that `text` completes, and what follows the end of the list."""
        self.unread += text
        calls: list[dict[str, Any]] = []
        while self._position < len(self.unread):
            if self._depth > 0:
                self._walk()
                if self._depth == 0:
                    call = _read_call(self.unread[self._call_start : self._position])
                    if call is None:
                        self.problem = "a tool call is not an object with a name and arguments"
                        break
                    calls.append(call)
                    self.has_calls = True
                    self.unread, self._position = self.unread[self._position :], 0
                    self._expected = ",]"
                continue
            character = self.unread[self._position]
            if character not in _JSON_SPACE and character not in self._expected:
                self.problem = "the tool calls are not a JSON list of objects"
                break
            if character == "{":
                self._call_start, self._depth = self._position, 1
            elif character in "[,":
                self._expected = "{"
            elif character == "]":
                self.is_closed = True
                return calls, self.unread[self._position + 1 :]
            self._position += 1
        return calls, ""

    def _walk(self) -> None:
        """Go on past the next brace, quote or backslash of the call, or to the end of the text."""
        if self._is_escaped:
            self._is_escaped = False
            self._position += 1
            return
        found = (_IN_STRING if self._is_string else _IN_OBJECT).search(self.unread, self._position)
        if found is None:
            self._position = len(self.unread)
            return
        self._position = found.end()
        if found[0] == '"':
            self._is_string = not self._is_string
        elif found[0] == "\\":
            self._is_escaped = True
        else:
            self._depth += 1 if found[0] in "{[" else -1


def _read_call(text: str) -> dict[str, Any] | None:
    """Return the name, arguments and id of one call, or None if it is none, or none that a prompt could hold."""
    value = _read_json(text)
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    if _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        return None
    arguments = value.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        # Some answers quote the object.
        parsed = _read_json(arguments)
        if isinstance(parsed, dict):
            arguments = parsed
        elif parsed is not None:
            arguments = json.dumps(arguments, ensure_ascii=False)
    elif not isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"name": name, "arguments": arguments, "id": value.get("id")}


def _read_json(text: str) -> Any:
    """Return the value of a JSON text, or None; line breaks inside strings are let through."""
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
