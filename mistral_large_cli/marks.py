"""Prompts and answers as a person reads them: control tokens set apart, and nothing that a terminal would obey."""

import re
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from modeling_mistral_large import MistralLargeTokenizer

CONTROL_STYLE = "bold magenta"
# Everything that can move the cursor or change the terminal: what is left are line ends and tabs.
_TERMINAL_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """Return a text that nobody has checked as it may be printed: escape sequences and the like become �."""
    return _TERMINAL_CONTROLS.sub("\ufffd", text)


def with_marks(tokenizer: "MistralLargeTokenizer", ids: "Sequence[int]") -> "Text":
    """Return the text of ids, its control tokens set apart."""
    from rich.text import Text

    control_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = []
    for is_control, group in groupby(ids, key=control_ids.__contains__):
        pieces += [
            Text(printable(str(tokenizer.decode(part))), style=CONTROL_STYLE if is_control else "")
            for part in (group if is_control else [list(group)])
        ]
    return Text(" ").join(pieces)
