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
    # sys.exit(False) and sys.exit(True) are 0 and 1.
    return int(exit_.value.code or 0)
