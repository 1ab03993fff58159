"""The parser that turns a completion into a message."""

import codecs
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mistral_large_conversion.vocabulary import SURROGATE, piece_bytes
from modeling_mistral_large.instruct.call_list import BRACE, JSON_SPACE, NO_CALL, Braces, CallList
from modeling_mistral_large.instruct.tool_call_ids import is_tool_call_id, new_tool_call_id

EOS_ID, EOS_TEXT = 2, "</s>"
TOOL_CALLS_ID, TOOL_CALLS_TEXT = 5, "[TOOL_CALLS]"


def _beginnings_of(text: str) -> str:
    """Return a pattern for every beginning of `text`, the empty one too."""
    pattern = ""
    for character in reversed(text):
        pattern = f"(?:{re.escape(character)}{pattern})?"
    return pattern


# In a text, the end of the response is `</s>` and any padding; more text may still turn it into something else.
_PADDING = r"\[control_[0-9]{1,3}\]"
_MARKER = re.compile(rf"{re.escape(EOS_TEXT)}|{re.escape(TOOL_CALLS_TEXT)}|{_PADDING}")
_BEGUN_MARKER = re.compile(
    rf"(?:{_beginnings_of(EOS_TEXT)}|{_beginnings_of(TOOL_CALLS_TEXT)}|{_beginnings_of('[control_')}[0-9]{{0,3}})\Z"
)
_LONGEST_BEGINNING = len("[control_123")

_CUT_OFF = "the tool calls are cut off"
_NESTED = "tool calls begin inside tool calls"


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
    """A response as a message.

    message: `role`, `content` and, where there are calls, `tool_calls`. What is marked as tool calls but cannot be
        read is part of `content`: nothing the model wrote is lost.
    problem: why that was so, or None.
    is_finished: whether the model ended the response with `</s>`.
    """

    message: dict[str, Any]
    problem: str | None
    is_finished: bool

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for how the response ended."""
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
    """Return the model's response as a message; raises nothing, whatever the response.

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
    """Parser for a response that arrives in pieces; its events put together are what `parse_answer` returns.

    The time is linear in the length of the response, whatever the response and its pieces.
    """

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
        # The end of a text that may turn out to be the end of the response, and the beginning of a marker after it.
        self._end: list[str] = []
        self._begun = ""
        # White space after tool calls.
        self._gap: list[str] | None = None
        self._open_list: CallList | None = None
        self._events: list[AnswerEvent] = []
        self._content: list[str] = []
        self._tool_calls: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._problem: str | None = None
        # What is still to decide the problem: the rest of the first call that was given up before its end.
        self._undecided: Braces | None = None
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
        """Take the end of the response and return what was held back for it."""
        self._read(self._decode([], final=True))
        while self._open_list:
            self._read_on(*self._give_up(_CUT_OFF))
        self._decide(_CUT_OFF)
        if self._end and not self._begun:
            self._is_finished = True
        else:
            self._say("".join([*self._end, self._begun]))
        self._end, self._begun = [], ""
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
                    if self._open_list:
                        text, position = self._give_up(_NESTED)
                        self._say(text[position:])
                    self._decide(_NESTED)
                    self._begin_calls(0)
                continue
            piece = self._vocabulary[token_id] if 0 <= token_id < len(self._vocabulary) else "\ufffd"
            if self._is_start and piece:
                # The tokenizer puts a ▁ before every text; a space that is a byte is the model's own.
                piece = piece.removeprefix("▁")
                self._is_start = False
            pieces.append(piece_bytes(piece))
        self._read(self._decode(pieces))

    def _decode(self, pieces: Iterable[bytes], *, final: bool = False) -> str:
        """Return the complete characters, and � for each byte that is not part of one, as SentencePiece does."""
        return SURROGATE.sub("\ufffd", self._utf8.decode(b"".join(pieces), final))

    def _read(self, text: str) -> None:
        if self._undecided:
            self._walk_on(text, 0)
        if self._begun:
            text, self._begun = self._begun + text, ""
        self._read_on(text, 0)

    def _read_on(self, text: str, position: int) -> None:
        """Read a text from a position on. One that is given up is read again from there, and never copied for it."""
        while position < len(text):
            if self._open_list is None:
                position = self._read_content(text, position)
                continue
            call, position = self._open_list.read(text, position)
            if call:
                self._add_call(call)
            elif self._open_list.is_closed:
                self._open_list = None
                self._gap = []
            elif self._open_list.problem:
                text, position = self._give_up(self._open_list.problem, text)
            elif self._open_list.is_broken:
                # No more text makes a call of it. Why it is none is known where the object ends.
                if self._problem is None and self._undecided is None:
                    self._undecided = self._open_list.braces
                    self._walk_on(text, position)
                text, position = self._give_up(None, text)
        if self._open_list:
            self._open_list.keep(text)

    def _read_content(self, text: str, position: int) -> int:
        """Say the text up to a marker that is spelled out, and return where what follows the marker begins."""
        if not self._is_text:
            self._say(text[position:])
            return len(text)
        said: list[str] = []
        while found := _MARKER.search(text, position):
            is_mark = found[0] == TOOL_CALLS_TEXT
            if found.start() > position or is_mark:
                said += [*self._end, text[position : found.start()]]
                self._end = []
            position = found.end()
            if is_mark:
                self._say("".join(said))
                self._begin_calls(position)
                return position
            (self._end if self._end or found[0] == EOS_TEXT else said).append(found[0])
        begun = _BEGUN_MARKER.search(text, max(position, len(text) - _LONGEST_BEGINNING))
        assert begun is not None, "the pattern matches the empty end"
        if begun.start() > position:
            said += [*self._end, text[position : begun.start()]]
            self._end = []
        self._begun = begun[0]
        self._say("".join(said))
        return len(text)

    def _begin_calls(self, position: int) -> None:
        self._gap = None
        self._open_list = CallList(position)

    def _add_call(self, call: dict[str, Any]) -> None:
        call_id = call.pop("id")
        if not isinstance(call_id, str) or not is_tool_call_id(call_id):
            call_id = new_tool_call_id(self._rng)
        while call_id in self._ids:
            call_id = new_tool_call_id(self._rng)
        self._ids.add(call_id)
        tool_call = {"type": "function", "id": call_id, "function": call}
        self._tool_calls.append(tool_call)
        self._events.append(ToolCallEvent(tool_call))

    def _give_up(self, problem: str | None, text: str = "") -> tuple[str, int]:
        """Leave the list of calls; return a text that ends as `text` does, and where in it the unread begins."""
        assert self._open_list is not None
        if not self._open_list.has_calls:
            self._say(TOOL_CALLS_TEXT)
        given_up, self._open_list = self._open_list, None
        if problem:
            self._note(problem)
        if given_up.parts:
            return "".join([*given_up.parts, text]), 0
        return text, given_up.start

    def _note(self, problem: str) -> None:
        """Keep the first problem."""
        if self._problem is None and self._undecided is None:
            self._problem = problem

    def _walk_on(self, text: str, position: int) -> None:
        assert self._undecided is not None
        self._undecided.walk(text, position, BRACE)
        if self._undecided.depth == 0:
            self._decide(NO_CALL)

    def _decide(self, problem: str) -> None:
        """Say what the problem of the call was that was given up before its end."""
        if self._undecided:
            self._undecided, self._problem = None, problem

    def _say(self, text: str) -> None:
        if self._gap is not None:
            # White space between tool calls and the end is not something the assistant says.
            self._gap.append(text)
            if not text.strip(JSON_SPACE):
                return
            text, self._gap = "".join(self._gap), None
            self._note("there is text after the tool calls")
        if text:
            self._content.append(text)
            self._events.append(TextEvent(text))
