"""Prompts and answers as a person reads them: control tokens set apart, and nothing that a terminal would obey."""

import re
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from modeling_mistral_large import MistralLargeTokenizer

# Whose part a control token begins or ends.
ROLES = {
    "<s>": "prompt",
    "[AVAILABLE_TOOLS]": "tools",
    "[/AVAILABLE_TOOLS]": "tools",
    "[INST]": "user",
    "[/INST]": "user",
    "[TOOL_CALLS]": "assistant",
    "</s>": "assistant",
    "[TOOL_RESULTS]": "results",
    "[/TOOL_RESULTS]": "results",
}
COLOURS = {"prompt": "white", "tools": "blue", "user": "green", "assistant": "magenta", "results": "cyan"}
# Everything that can move the cursor, change the terminal or turn the order of letters around, and what no terminal can
# print: what is left are line ends and tabs.
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What begins another line or column.
_BREAKS = re.compile("[\t\n\u2028\u2029]")


def printable(text: str) -> str:
    """Return a text that nobody has checked as it may be printed: escape sequences and the like become �."""
    return _TERMINAL_CONTROLS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Return a text that nobody has checked as it may be printed in a line that says something of it."""
    return _BREAKS.sub("\ufffd", printable(text))


def control_style(token: str) -> str:
    """How a control token looks: bold, in the colour of its role."""
    return f"bold {COLOURS[ROLES.get(token, 'prompt')]}"


def with_marks(tokenizer: "MistralLargeTokenizer", ids: "Sequence[int]") -> "Text":
    """Return the text of ids, its control tokens set apart."""
    from rich.text import Text

    control_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = []
    for is_control, group in groupby(ids, key=control_ids.__contains__):
        for part in group if is_control else [list(group)]:
            text = printable(str(tokenizer.decode(part)))
            pieces.append(Text(text, style=control_style(text) if is_control else ""))
    return Text(" ").join(pieces)
