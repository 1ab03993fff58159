"""JSON texts as the reference writes them into prompts, with errors that name the place."""

import json
import re
from typing import Any

from .errors import ConversationError

SHOWN_CHARACTERS = 100

_SURROGATE = re.compile("[\ud800-\udfff]")
_encode = json.JSONEncoder(ensure_ascii=False).encode


def write_json(value: Any, where: str) -> str:
    """Return the JSON text of a value in the prompt's form: spaces after `,` and `:`, no escapes for Unicode."""
    try:
        text = _encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversationError(f"{where}: {error}; only JSON values have a place in a prompt; convert it") from error
    return check_unicode(text, where)


def rewrite_json(text: str, where: str) -> str:
    """Return a JSON text in the prompt's form; any other text becomes a JSON string."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{where}: {error}; JSON must be readable by Python; shorten or quote it") from error
    return write_json(value, where)


def check_unicode(text: str, where: str) -> str:
    """Return the text, or raise if it cannot be encoded."""
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise ConversationError(
            f"{where}: lone surrogate {found[0]!r} at character {found.start()}; text must be Unicode; "
            "decode it again or replace the character"
        )
    return text


def show(value: Any) -> str:
    """Return a value as an error can quote it: in one line that is not too long."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
