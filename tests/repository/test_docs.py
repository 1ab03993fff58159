"""What the documents say of the code: messages that occur, modules that exist, figures of the result files."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from tests.campaign.reliability import SECTIONS, table

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SOURCES = [*(ROOT / "modeling_mistral_large").glob("*.py"), *(ROOT / "conversion").glob("*.py")]
SOURCES += (ROOT / "mistral_large_cli").glob("*.py")
# Beside the tables of the API: what others call only through these.
INTERNAL = {
    *("destination", "finished", "hf_files", "model_card", "names", "params", "rope", "safetensors_header"),
    *("quantize", "source_files", "stream", "tokenizer", "transforms", "__init__"),
    *("consolidated_loading", "json_text", "vllm_renderer", "masked_attention", "gpu_kernels", "adapter_loading"),
    *("transformers_api", "supported", "remote_code", "peft_defaults", "custom_templates", "text_generation_pipeline"),
}


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


@pytest.mark.parametrize("message", messages("message"))
def test_a_message_that_is_explained_occurs_in_the_source(message: str, own_texts: list[str]) -> None:
    assert sum(map(len, re.split("…", message))) > 6
    assert any(occurs(message, text) for text in own_texts)


@pytest.mark.parametrize("message", messages("message of transformers"))
def test_a_message_of_transformers_occurs_in_its_source(message: str) -> None:
    folder = Path(transformers.__file__).parent
    paths = [folder / "models" / "auto" / name for name in ("configuration_auto.py", "auto_factory.py")]
    assert any(occurs(message, text) for path in paths for text in templates(path))


def documented_modules() -> set[str]:
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))


def test_every_module_is_documented_or_internal_and_every_documented_one_is_there() -> None:
    folders = {"modeling_mistral_large": ROOT / "modeling_mistral_large"}
    folders["modeling_mistral_large.conversion"] = ROOT / "conversion"
    folders["modeling_mistral_large.inference"] = ROOT / "modeling_mistral_large" / "inference"
    modules = {f"{package}.{path.stem}" for package, folder in folders.items() for path in folder.glob("*.py")}
    public = {module for module in modules if module.rpartition(".")[2] not in INTERNAL}
    beside = {"modeling_mistral_large", "modeling_mistral_large.chat_templates", "mistral_large_cli.serve"}
    assert documented_modules() == public | beside


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
