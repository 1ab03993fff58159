"""The command in this process."""

import sys

import pytest

from mistral_large_cli import main


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `mistral-large` with these arguments; returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["mistral-large", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    # sys.exit(False) and sys.exit(True) are 0 and 1.
    return int(exit_.value.code or 0)
