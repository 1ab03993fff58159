"""The words of the field in what a user reads: README, documents, and the help of the command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mistral_large_cli import app
from tests.repository.command_line import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "SECURITY.md", "RELEASING.md", "CONTRIBUTING.md", "examples/README.md"]
PAGES += sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
# Wide, and without colours.
WIDE = {"COLUMNS": "200", "TERM": "dumb"}
# The word that is not used, as a regular expression, and the one that is.
WORDS = {
    r"in parts\b|parts of (a|the|each|long) prompt": "chunks, chunked prefill",
    r"expand(s|ed)?\b(?! the context)": "dequantize, dequantized",
    r"\bcards?\b(?! \(card\))": "GPUs",
    r"\bmend(s|ed)?\b": "fix",
    r"likeliest": "most likely",
    r"\bnasty\b|\bhostile\b|\bgluings?\b": "unusual, adversarial, contexts",
    r"\bthe way back\b|\bway back\b": "export to consolidated",
    r"\bgo(es)? along\b": "is copied",
    r"\bto be had\b|\bcan(not)? be had\b": "available",
    r"\bdo(es)? not know (us|this package)\b": "engines without this package",
    r"\bso many\b": "name the number",
    r"in the place of": "instead of",
    r"positions of (a|the) prompt|positions at a time": "tokens",
    r"\b(million|billion) (weights|numbers)\b": "parameters",
    r"what the assistant says": "assistant tokens",
    r"\banswers?\b(?! conversations --)": "response, completion",
    r"\bbeside\b": "next to",
    r"\bfindings?\b": "issue, problem",
    r"\bso much\b": "name the thing",
}
# Quotations, and words that mean something else: a model card is no GPU.
ALLOWED = re.compile(
    r"model card|card\.py|the card's|the card (does|gives)|published after the model card|gpu-CARD"
    r"|files that cannot be had"  # the campaign's own table
)


def offences(text: str, source: str) -> list[str]:
    """Every use of a word that is not ours, with its line."""
    found = []
    for line in text.splitlines():
        plain = ALLOWED.sub("", line)
        for word, better in WORDS.items():
            if match := re.search(word, plain, re.IGNORECASE):
                found.append(f"{source}: {match[0]!r}: {better}: {line.strip()[:100]}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_in_the_words_of_the_field(page: str) -> None:
    assert offences((ROOT / page).read_text(encoding="utf-8"), page) == []


def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [*command.split(), "--help"], prog_name="python -m mistral_large_cli", env=WIDE)
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_is_in_the_words_of_the_field(command: str) -> None:
    assert offences(help_of(command), command) == []


@pytest.mark.slow
def test_the_help_of_a_process_is_the_same() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **WIDE}
    for command in ("", "chat"):
        arguments = [sys.executable, "-m", "mistral_large_cli", *command.split(), "--help"]
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
        assert result.stdout == help_of(command)


def test_a_word_that_is_not_ours_is_found() -> None:
    assert len(offences("The card has 4 million weights.\nIt was mended.", "page")) == 3
    assert offences("The model card has 4 million parameters.", "page") == []
