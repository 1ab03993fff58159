"""Highlighting of control tokens in prompts and completions, by role."""

from itertools import groupby
from typing import TYPE_CHECKING

from mistral_large_conversion.prompt_roles import COLOURS, ROLES

from .terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from modeling_mistral_large import MistralLargeTokenizer


def control_style(token: str) -> str:
    """Return the style of a control token: bold, in the colour of its role."""
    return f"bold {COLOURS[ROLES.get(token, 'prompt')]}"


def highlighted(tokenizer: "MistralLargeTokenizer", ids: "Sequence[int]") -> "Text":
    """Return the text of ids, its control tokens in the colours of their roles."""
    from rich.text import Text

    control_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces = []
    for is_control, group in groupby(ids, key=control_ids.__contains__):
        for part in group if is_control else [list(group)]:
            text = printable(str(tokenizer.decode(part)))
            pieces.append(Text(text, style=control_style(text) if is_control else ""))
    return Text(" ").join(pieces)
