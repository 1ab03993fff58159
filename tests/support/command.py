"""The command line in the process of a test."""

import sys

import pytest

from mistral_large_cli import main


def run(*arguments: object) -> int:
    """Run the command as it is typed and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mistral-large", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code
