"""What the tests of the converter share."""

from tests.support.remembered import remembered_vocabularies as remembered_vocabularies
