"""The chat and response templates that travel with every converted checkpoint, and all released ones."""

import json
import re
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

from mistral_large_conversion.chat_templates.response_template import RESPONSE_TEMPLATES, START_ANCHORS

__all__ = [
    "CHAT_TEMPLATES",
    "PLAIN_CHAT_TEMPLATES",
    "RESPONSE_TEMPLATES",
    "START_ANCHORS",
    "prompt_format_of",
    "response_format_of",
]

# By prompt format, as tokenizer_config.json records it.
TEMPLATE_FILES = {"v3": "mistral_large_2407.jinja", "v7": "mistral_large_2411.jinja"}

# What both formats need is written once. A template that travels is one file, and engines have no loader for another.
_INCLUDE = re.compile(r'\{%- include "(\w+\.jinja)" -%\}\n')


def _read(name: str) -> str:
    text = files(__name__).joinpath(name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda include: _read(include[1]), text)


CHAT_TEMPLATES: dict[str, str] = {prompt_format: _read(name) for prompt_format, name in TEMPLATE_FILES.items()}

# For a jinja2 without transformers' `generation` tag, which marks what the assistant says and renders nothing.
PLAIN_CHAT_TEMPLATES: dict[str, str] = {
    prompt_format: re.sub(r"\{%- (end)?generation -%\}", "", template)
    for prompt_format, template in CHAT_TEMPLATES.items()
}

# `template_sha256` and `response_template_sha256` of every template that a version of this package has written: folders
# keep the one they were converted with. tests/released_templates has each of them; a new template adds its own.
CHAT_TEMPLATES_SHA256 = {
    "a80bb409395f7c6d70db8de9824d1fb45040d9eb706f757f91df663bbf478aa8": "v3",
    "cca8bfd2b36988314ea38f0927d690b7aea9ef858dbb74e03b85341d26eb2ee0": "v7",
    # Without `generation` tags.
    "9b79ca7f9ab026e9b0c0d4859fcf40d8e07483755140d8cca85e92628d5ed169": "v3",
    "28a42245f0ac2150370f34e6895a003d1df501878b2e516fef0c5b56461fe163": "v7",
}
RESPONSE_TEMPLATES_SHA256 = {
    "87b45630ea095aa497f8863d3d6b0837e455c6655f0210d594c26f6bfb3c35b1": "v3",
    "77cc227feeec61379ca87d886935aa45517ff692e2a9e930d01cb64179a69e27": "v7",
}

_NOT_RENDERED = ("comment_begin", "comment", "comment_end", "whitespace")


def prompt_format_of(template: object) -> str | None:
    """Return the prompt format of a chat template, or None where it is none of the released ones.

    What renders the same is the same template: comments, line endings, a byte order mark, white space inside of tags
    and around the whole do not matter.
    """
    return _known_format(template) if isinstance(template, str) else None


@lru_cache(maxsize=64)
def _known_format(template: str) -> str | None:
    for bundled in (CHAT_TEMPLATES, PLAIN_CHAT_TEMPLATES):
        for prompt_format, known in bundled.items():
            if template == known:
                return prompt_format
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
    for prompt_format, known in RESPONSE_TEMPLATES.items():
        if template == known:
            return prompt_format
    try:
        return RESPONSE_TEMPLATES_SHA256.get(response_template_sha256(template))
    except (TypeError, ValueError):
        return None


def response_template_sha256(template: Any) -> str:
    """Return the hash of a response template, whatever the order of its keys."""
    return sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()
