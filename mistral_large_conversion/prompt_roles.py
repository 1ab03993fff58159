"""Whose part of a prompt its control tokens and texts are, and the colours in which they are shown."""

from collections.abc import Iterable, Iterator

# The role whose part of a prompt a control token begins or ends.
ROLES = {
    "<s>": "prompt",
    "[SYSTEM_PROMPT]": "system",
    "[/SYSTEM_PROMPT]": "system",
    "[AVAILABLE_TOOLS]": "tools",
    "[/AVAILABLE_TOOLS]": "tools",
    "[INST]": "user",
    "[/INST]": "user",
    "[TOOL_CALLS]": "assistant",
    "</s>": "assistant",
    "[TOOL_RESULTS]": "results",
    "[TOOL_CONTENT]": "results",
    "[/TOOL_RESULTS]": "results",
}
COLOURS = {
    "prompt": "white",
    "system": "yellow",
    "tools": "blue",
    "user": "green",
    "assistant": "magenta",
    "results": "cyan",
}


def roles_of(segments: Iterable[tuple[str, bool]]) -> Iterator[str]:
    """Yield the role of each segment of a prompt; a text has that of the control token before it.

    segments: texts, and whether each is a control token.
    """
    role = "prompt"
    for text, is_control in segments:
        if is_control:
            role = ROLES[text]
            yield role
            if text.startswith("[/"):
                # What follows the instruction or the results, and is no control token, is the assistant's.
                role = "assistant"
        else:
            yield role


def html_prompt(segments: Iterable[tuple[str, bool]]) -> str:
    """A prompt in HTML, control tokens bold in the colour of their role; texts are escaped, as they are anybody's."""
    # Importing the package loads no more than stock Mistral does.
    from html import escape

    segments = list(segments)
    spans = []
    for (text, is_control), role in zip(segments, roles_of(segments), strict=True):
        colour = "inherit" if COLOURS[role] == "white" else COLOURS[role]
        weight = "; font-weight: bold" if is_control else ""
        # As a rendered prompt has it: a text that is not empty follows the space of its dummy ▁.
        written = text if is_control or not text else f" {text}"
        spans.append(f'<span style="color: {colour}{weight}">{escape(written)}</span>')
    return f'<div style="font-family: monospace; white-space: pre-wrap">{"".join(spans)}</div>'
