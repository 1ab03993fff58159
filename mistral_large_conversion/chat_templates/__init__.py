"""The chat template and the response template that travel with every converted checkpoint, and all released ones."""

import json
import re
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from mistral_large_conversion.chat_templates.response_template import RESPONSE_TEMPLATE

__all__ = [
    "CHAT_TEMPLATE",
    "PLAIN_CHAT_TEMPLATE",
    "PROMPT_FORMAT",
    "RESPONSE_TEMPLATE",
    "prompt_format_of",
    "response_format_of",
]

# The format of the prompts of the bundled templates, as tokenizer_config.json records it.
PROMPT_FORMAT = "v3"

CHAT_TEMPLATE: str = files(__name__).joinpath("mistral_large_2407.jinja").read_text(encoding="utf-8")

# For a jinja2 without transformers' `generation` tag, which marks what the assistant says and renders nothing.
PLAIN_CHAT_TEMPLATE: str = re.sub(r"\{%- (end)?generation -%\}", "", CHAT_TEMPLATE)

# `template_sha256` and `response_template_sha256` of every template that a version of this package has written: folders
# keep the one they were converted with. tests/released_templates has each of them; a new template adds its own.
CHAT_TEMPLATES_SHA256 = {
    "a80bb409395f7c6d70db8de9824d1fb45040d9eb706f757f91df663bbf478aa8": "v3",
    # Without `generation` tags.
    "9b79ca7f9ab026e9b0c0d4859fcf40d8e07483755140d8cca85e92628d5ed169": "v3",
}
RESPONSE_TEMPLATES_SHA256 = {"87b45630ea095aa497f8863d3d6b0837e455c6655f0210d594c26f6bfb3c35b1": "v3"}

_NOT_RENDERED = ("comment_begin", "comment", "comment_end", "whitespace")


def prompt_format_of(template: object) -> str | None:
    """Return the prompt format of a chat template, or None where it is none of the released ones.

    What renders the same is the same template: comments, line endings, a byte order mark, white space inside of tags
    and around the whole do not matter.
    """
    return _known_format(template) if isinstance(template, str) else None


@lru_cache(maxsize=64)
def _known_format(template: str) -> str | None:
    if template in (CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE):
        return PROMPT_FORMAT
    from jinja2 import TemplateSyntaxError

    try:
        return CHAT_TEMPLATES_SHA256.get(template_sha256(template))
    except TemplateSyntaxError:
        return None


def template_sha256(template: str) -> str:
    """Return the hash of what a chat template renders: its tags and its text, without what has no effect."""
    # Most templates are known by their text, and an import of jinja2 takes as long as all other work on a small folder.
    from jinja2 import Environment

    # The settings transformers renders chat templates with; they decide which white space is text.
    lexer = Environment(trim_blocks=True, lstrip_blocks=True)
    hashed: list[tuple[str, str]] = []
    for _, kind, value in lexer.lex(template.removeprefix("\ufeff").strip()):
        if kind in _NOT_RENDERED:
            continue
        if kind == "data" and hashed and hashed[-1][0] == "data":
            # A comment stood between two pieces of one text.
            hashed[-1] = ("data", hashed[-1][1] + value)
        else:
            # The end of a tag holds the white space that it strips.
            hashed.append((kind, value if kind in ("data", "string") else value.strip()))
    return sha256(json.dumps(hashed).encode()).hexdigest()


def response_format_of(template: object) -> str | None:
    """Return the format that a response template reads, or None where it is none of the released ones."""
    if template == RESPONSE_TEMPLATE:
        return PROMPT_FORMAT
    try:
        return RESPONSE_TEMPLATES_SHA256.get(response_template_sha256(template))
    except (TypeError, ValueError):
        return None


def response_template_sha256(template: Any) -> str:
    """Return the hash of a response template, whatever the order of its keys."""
    return sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
