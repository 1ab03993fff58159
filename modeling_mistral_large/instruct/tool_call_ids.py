"""Ids of tool calls: 9 letters and digits, made or mapped from those of other formats."""

import random
import re
import string
from collections.abc import Hashable, Iterable

ID_LENGTH = 9

ID_CHARACTERS = string.ascii_letters + string.digits

# The ids that stand for one that collides or is too short count up from here: always 9 digits.
FIRST_RUNNING_ID = 10 ** (ID_LENGTH - 1)

# The reference matches with `$`, which also lets one final newline through.
_VALID_ID = re.compile(r"[a-zA-Z0-9]{9}\n?")

_NOT_IN_ID = re.compile("[^a-zA-Z0-9]")


def new_tool_call_id(rng: random.Random | None = None) -> str:
    """Return 9 random letters and digits, from `rng` where ids must be reproducible."""
    return "".join((rng or random.SystemRandom()).choices(ID_CHARACTERS, k=ID_LENGTH))


def is_tool_call_id(text: str) -> bool:
    """Return whether the instruct formats take `text` as the id of a tool call."""
    return _VALID_ID.fullmatch(text) is not None


def map_tool_call_ids(ids: Iterable[Hashable]) -> dict[Hashable, str]:
    """Return the 9-character id of every id, in a way the Jinja template computes too.

    A valid id stays. Any other becomes its last 9 letters and digits, or a running number where it has fewer, where
    those are taken, and where there was no id at all (anything but a string stands for that). Never two to one.
    """
    ids = list(ids)
    mapped: dict[Hashable, str] = {}
    taken = {given for given in ids if isinstance(given, str) and is_tool_call_id(given)}
    renamed = 0
    running = FIRST_RUNNING_ID
    for given in ids:
        if given in mapped:
            continue
        if isinstance(given, str) and is_tool_call_id(given):
            mapped[given] = given
            continue
        kept = _NOT_IN_ID.sub("", given)[-ID_LENGTH:] if isinstance(given, str) else ""
        if len(kept) < ID_LENGTH or kept in taken:
            # The first free number only grows, so no number is tried twice.
            running = max(running, FIRST_RUNNING_ID + renamed)
            while str(running) in taken:
                running += 1
            kept = str(running)
        mapped[given] = kept
        taken.add(kept)
        renamed += 1
    return mapped
