"""The command line in the process of a test."""

import sys
from functools import lru_cache

import pytest
import typer.main

from mistral_large_cli import main

# What typer makes of the functions of all commands, which takes longer than many of them.
_command_of = lru_cache(1)(typer.main.get_command)


def run(*arguments: object) -> int:
    """Run the command as it is typed and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", _command_of)
        patch.setattr(sys, "argv", ["mistral-large", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
    # sys.exit(False) and sys.exit(True) are 0 and 1.
    return int(exit_.value.code or 0)
