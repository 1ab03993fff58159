"""What the documents say of the code: messages that occur, modules that exist, figures of the result files."""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.campaign.reliability import SECTIONS, table
from tests.support.markdown import blocks

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGES = ("modeling_mistral_large", "mistral_large_conversion", "mistral_large_cli")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
# Facades that nobody imports from: what they hold is documented under another name, or is a plugin's.
INTERNAL_FACADES = {
    "mistral_large_conversion.chat_templates",
    "modeling_mistral_large.serving.page",
}
NO_FACADES = {"modeling_mistral_large.integrations.vllm_plugin"}


def templates(path: Path) -> Iterator[str]:
    """The texts of a source file, with `…` for each value that is put into one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)


def messages(heading: str) -> list[str]:
    """The first cells of the tables whose first column has this heading."""
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    tables = re.findall(rf"^\| {heading} \|.*\n\|[ |-]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [cell for table in tables for cell in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]


def occurs(message: str, text: str) -> bool:
    """Whether a message is an instance of a text with the same `…`, or is part of one."""
    parts = [part for part in re.split("…", message) if part.strip()]
    return re.search(".*".join(map(re.escape, parts)), text, re.DOTALL) is not None


@pytest.fixture(scope="module")
def own_texts() -> list[str]:
    return [text for path in SOURCES for text in templates(path) if "\n\n" not in text]


def test_every_row_of_the_tables_is_read() -> None:
    rows = re.findall(r"^\| `", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(messages("message")) + len(messages("message of transformers")) == len(rows) > 50


@pytest.mark.slow
@pytest.mark.parametrize("message", messages("message"))
def test_a_message_that_is_explained_occurs_in_the_source(message: str, own_texts: list[str]) -> None:
    assert sum(map(len, re.split("…", message))) > 6
    assert any(occurs(message, text) for text in own_texts)


@pytest.mark.parametrize("message", messages("message of transformers"))
def test_a_message_of_transformers_occurs_in_its_source(message: str) -> None:
    folder = Path(transformers.__file__).parent
    paths = [folder / "models" / "auto" / name for name in ("configuration_auto.py", "auto_factory.py")]
    assert any(occurs(message, text) for path in paths for text in templates(path))


def documented() -> set[str]:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))


def facades() -> set[str]:
    """The packages and modules that declare their public names and collect them from others, or hold the errors."""
    found = {"modeling_mistral_large.errors"}
    for package in PACKAGES[:2]:
        for path in (ROOT / package).rglob("__init__.py"):
            if "\n__all__ = [" in path.read_text(encoding="utf-8"):
                found.add(".".join(path.parent.relative_to(ROOT).parts))
    return found


def test_every_facade_is_documented_and_every_documented_module_is_there() -> None:
    classes = {name for name in documented() if name.rpartition(".")[2][0].isupper()}
    assert classes == {"modeling_mistral_large.MistralLargeTokenizer"}
    assert documented() - classes == (facades() - INTERNAL_FACADES) | NO_FACADES


def imports(code: str) -> Iterator[tuple[str, str]]:
    """The module and name of every import from our packages."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(PACKAGES[:2]):
            yield from ((node.module, alias.name) for alias in node.names)


def shown_code() -> Iterator[tuple[Path, str]]:
    for path in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for block in blocks(ROOT, path.relative_to(ROOT).as_posix()):
            if block.language == "python":
                yield path, block.code
    for path in (ROOT / "examples").rglob("*.py"):
        yield path, path.read_text(encoding="utf-8")


def test_documents_and_examples_import_from_the_facades_alone() -> None:
    found = [(path, module, name) for path, code in shown_code() for module, name in imports(code)]
    assert len(found) > 20
    for path, module, name in found:
        assert module in facades(), f"{path}: {module}"
        assert name in public_names(module), f"{path}: {module}.{name}"


def public_names(module: str) -> set[str]:
    names: set[str] = set(importlib.import_module(module).__all__)
    return names


def test_every_page_is_in_the_list_of_the_site() -> None:
    listed = re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert len(set(listed)) == len(listed)


def test_the_table_of_the_campaign_is_that_of_its_results_and_nothing_was_lost() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "reliability.json").read_text(encoding="utf-8"))
    assert table(results) in (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert list(results) == list(SECTIONS)
    assert not [
        section[broken] for section in results.values() for broken in ("losses", "tracebacks") if section[broken]
    ]
    assert results["kills"]["cases"] >= 200
    assert results["damage"]["figures"]["kinds"] >= 50
