"""Every code block of the documents runs, on the demo checkpoint under the names the real ones would have."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint.quantization import Scheme
from tests.support import folders
from tests.support.adapters import save_peft_adapter
from tests.support.markdown import Block, blocks
from tests.support.warm_python import WarmPython

ROOT = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *PAGES]
# Blocks under this comment are run by .ci/run, each in a fresh virtual environment, or need what is not at hand.
NOT_HERE = ("command: ", "needs ")
LANGUAGES_WITHOUT_CODE = {"", "text"}

BLOCKS = [
    block
    for document in DOCUMENTS
    if document != "CONTRIBUTING.md"
    for block in blocks(ROOT, document)
    if block.language not in LANGUAGES_WITHOUT_CODE and not block.mark.startswith(NOT_HERE)
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A folder in which the README's names, and those of the quickstart, are the demo's checkpoints."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("Mistral-Large-Instruct-2407", "toy"):
        assemble_demo_checkpoint(folder / name)
    for name in ("converted", "toy-hf"):
        (folder / name).symlink_to(demo_folder)
    folders.fine_tune(folder / "my-tune")
    save_peft_adapter(demo_folder, folder / "tuned" / "adapter")
    return folder


def test_the_readme_has_code() -> None:
    assert {block.language for block in BLOCKS if block.document == "README.md"} == {"bash", "python"}


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_of_the_documents_runs(block: Block, workplace: Path, warm_python: WarmPython) -> None:
    # In whatever order blocks run, what another one of them converts is there.
    makes_it = re.search(r"Mistral-Large-Instruct-2407\W+Mistral-Large-2407-hf", block.code)
    if not makes_it and not (workplace / "Mistral-Large-2407-hf").exists():
        (workplace / "Mistral-Large-2407-hf").symlink_to(workplace / "converted")
    for scheme in get_args(Scheme):
        folder = workplace / f"Mistral-Large-2407-{scheme}"
        if folder.name in block.code and f"{folder.name} --quantize" not in block.code and not folder.exists():
            convert_checkpoint(workplace / "Mistral-Large-Instruct-2407", folder, quantize=scheme)
    assert block.language in ("bash", "python")
    scripts = Path(sys.executable).parent
    path = os.pathsep.join(map(str, (warm_python.folder, scripts, os.environ["PATH"])))
    environment = {**warm_python.environment, "PATH": path}
    result = subprocess.run(
        block.command(warm_python.python), cwd=workplace, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, f"{block}\n{result.stdout}\n{result.stderr}"
    # A block ends with a comment that says what it prints, where that is fixed.
    assert not block.unprinted(result.stdout), f"{block}\n{result.stdout}"


def test_the_documents_speak_of_files_that_exist() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / document).parent / name).exists(), f"{document}: {name}"


def test_both_command_lines_of_the_readme_are_found_by_ci() -> None:
    for name in ("demo", "test"):
        (command,) = (block for block in blocks(ROOT, "README.md") if block.mark == f"command: {name}")
        assert (command.language, command.code.count("\n")) == ("bash", 1)
        arguments = [sys.executable, "-m", "tests.support.markdown", "README.md", name]
        assert subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout == command.code
