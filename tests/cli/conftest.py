"""What the tests of the command share."""

from collections.abc import Iterator

import pytest

from tests.support import remembered


@pytest.fixture(scope="package", autouse=True)
def _remembered_vocabularies() -> Iterator[None]:
    with remembered.vocabularies():
        yield
