"""Errors compared whole: a fragment of a message passes although the rest of it is wrong."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_exactly(error: type[BaseException], message: str) -> Iterator[None]:
    """Expect an error of this class, or one derived from it, whose message is `message` to the letter."""
    with pytest.raises(error) as raised:
        yield
    assert str(raised.value) == message


def whole(message: str) -> str:
    """Return the pattern of this whole message, in which `<*>` is what varies: an address, the words of a library."""
    return rf"(?s)\A{re.escape(message).replace(re.escape('<*>'), '.+')}\Z"
