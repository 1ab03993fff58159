"""The JSON list of tool calls in a completion that arrives in pieces."""

import json
import re
from typing import Any

from mistral_large_conversion.vocabulary import SURROGATE

JSON_SPACE = " \t\n\r"
BRACE = re.compile(r'["{}\[\]]')
# Also finds what no JSON value has outside of its strings.
BRACE_OR_NO_JSON = re.compile(r'["{}\[\]]|[^-+.0-9eEtrufalsnNIiy,: \t\n\r]')
_IN_STRING = re.compile(r'["\\]')

NO_LIST = "the tool calls are not a JSON list of objects"
NO_CALL = "a tool call is not an object with a name and arguments"


class Braces:
    """The braces and brackets of a JSON object that arrives in pieces: how many are open after each."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.is_string = False
        self.is_escaped = False

    def walk(self, text: str, position: int, outside: re.Pattern[str]) -> int:
        """Walk to the end of the object, of the text, or up to what `outside` finds and is neither brace nor quote."""
        while self.depth > 0 and position < len(text):
            if self.is_escaped:
                self.is_escaped = False
                position += 1
                continue
            found = (_IN_STRING if self.is_string else outside).search(text, position)
            if found is None:
                return len(text)
            if found[0] == '"':
                self.is_string = not self.is_string
            elif self.is_string:
                self.is_escaped = True
            elif found[0] in "{[":
                self.depth += 1
            elif found[0] in "}]":
                self.depth -= 1
            else:
                return found.start()
            position = found.end()
        return position


class CallList:
    """A JSON list of tool calls that arrives in pieces.

    parts, start: the text since the last complete call: whole earlier texts, and where in the one at hand it begins.
    problem: why reading stopped before the end of the list, or None.
    is_broken: whether it stopped inside of an object that no JSON object begins like.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.parts: list[str] = []
        self.has_calls = False
        self.is_closed = False
        self.is_broken = False
        self.problem: str | None = None
        self.braces = Braces(0)
        self._expected = "["

    def read(self, text: str, position: int) -> tuple[dict[str, Any] | None, int]:
        """Read on up to the end of a call, of the list or of the text, or to a problem; return the call and the place.

        A broken object is left at once: where marks of tool calls stand in an object, outside of its strings, each
        is a new beginning, and text would be walked as often as there are marks before it.
        """
        while position < len(text):
            if self.braces.depth > 0:
                position = self.braces.walk(text, position, BRACE_OR_NO_JSON)
                if self.braces.depth == 0:
                    unread = "".join([*self.parts, text[self.start : position]])
                    call = _read_call(unread[unread.index("{") :])
                    if call is None:
                        self.problem = NO_CALL
                        return None, position
                    self.has_calls = True
                    self.parts, self.start, self._expected = [], position, ",]"
                    return call, position
                if position < len(text):
                    self.is_broken = True
                    return None, position
                continue
            character = text[position]
            if character not in JSON_SPACE and character not in self._expected:
                self.problem = NO_LIST
                return None, position
            position += 1
            if character == "{":
                self.braces = Braces(1)
            elif character in "[,":
                self._expected = "{"
            elif character == "]":
                self.is_closed = True
                return None, position
        return None, position

    def keep(self, text: str) -> None:
        """Take the end of the text at hand."""
        if self.start < len(text):
            self.parts.append(text[self.start :])
        self.start = 0


def _read_call(text: str) -> dict[str, Any] | None:
    """Return the name, arguments and id of one call, or None if it is none, or none that a prompt could hold."""
    value = _read_json(text)
    if not isinstance(value, dict) or not isinstance(name := value.get("name"), str):
        return None
    try:
        written = json.dumps(value, ensure_ascii=False)
    # Writing needs more of the stack than reading.
    except RecursionError:
        return None
    if SURROGATE.search(written):
        return None
    arguments = value.get("arguments")
    if arguments is None:
        arguments = {}
    elif isinstance(arguments, str):
        # Some responses quote the object.
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
