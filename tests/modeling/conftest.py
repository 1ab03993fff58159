"""What the tests of the library share."""

from tests.support.remembered import remembered_vocabularies as remembered_vocabularies
