"""Every code block of the documents runs, on the demo checkpoint under the names the real ones would have."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mistral_large_cli.demo import assemble_demo_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
# Blocks under this comment are run by .ci/run, each in a fresh virtual environment, or need what is not at hand.
NOT_HERE = re.compile(r"<!-- (command: \w+|needs .+) -->$")
LANGUAGES_WITHOUT_CODE = {"", "text"}


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    """The code blocks of one document that are to run here."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        before = text[: match.start()]
        if match[1] not in LANGUAGES_WITHOUT_CODE and not NOT_HERE.search(before.rstrip()):
            found.append(Block(document, before.count("\n") + 1, match[1], match[2]))
    return found


BLOCKS = [block for document in DOCUMENTS if document != "CONTRIBUTING.md" for block in blocks(document)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A folder in which the README's names, and those of the quickstart, are the demo's checkpoints."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("Mistral-Large-Instruct-2407", "toy"):
        assemble_demo_checkpoint(folder / name)
    for name in ("converted", "toy-hf"):
        (folder / name).symlink_to(demo_folder)
    return folder


def test_the_readme_has_code() -> None:
    assert {block.language for block in BLOCKS if block.document == "README.md"} == {"bash", "python"}


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_of_the_documents_runs(block: Block, workplace: Path) -> None:
    # In whatever order blocks run, what another one of them converts is there.
    makes_it = re.search(r"Mistral-Large-Instruct-2407\W+Mistral-Large-2407-hf", block.code)
    if not makes_it and not (workplace / "Mistral-Large-2407-hf").exists():
        (workplace / "Mistral-Large-2407-hf").symlink_to(workplace / "converted")
    command = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}[block.language]
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [*command, block.code], cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    # A block ends with a comment that says what it prints, where that is fixed.
    for line in re.findall(r"^# prints: (.+)$", block.code, re.MULTILINE):
        assert line in result.stdout, f"{block}\n{result.stdout}"


def test_the_documents_speak_of_files_that_exist() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / document).parent / name).exists(), f"{document}: {name}"


def test_both_command_lines_of_the_readme_are_found_by_ci() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in ("demo", "test"):
        assert len(re.findall(rf"<!-- command: {name} -->\n```bash\n[^\n]+\n```", text)) == 1
