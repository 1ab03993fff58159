"""Errors compared whole: a fragment of a message passes although the rest of it is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def raises_exactly(error: type[BaseException], message: str) -> Iterator[None]:
    """Expect an error of this class, or one derived from it, whose message is `message` to the letter."""
    with pytest.raises(error) as raised:
        yield
    assert str(raised.value) == message
