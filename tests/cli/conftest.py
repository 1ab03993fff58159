"""What the tests of the command share."""

from tests.support.remembered import remembered_vocabularies as remembered_vocabularies
