"""Highlighting of control tokens in prompts and completions, by role."""

from itertools import groupby
from typing import TYPE_CHECKING

from .terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from modeling_mistral_large import MistralLargeTokenizer

# The role whose part of a prompt a control token begins or ends.
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
