"""What a release says of itself: one address, one version, links that work on an index, figures of the result files."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools  # type: ignore[import-untyped]  # it has no types of its own

import modeling_mistral_large

ROOT = Path(__file__).parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", found.update)
    runpy.run_path(str(ROOT / "setup.py"))
    return found


def test_the_address_is_the_same_everywhere(metadata: dict[str, Any]) -> None:
    names = ["mkdocs.yml", "CITATION.cff", ".github/ISSUE_TEMPLATE/config.yml"]
    for name in names:
        assert set(re.findall(r"https://github\.com/[\w-]+/modeling-mistral-large", text(name))) == {metadata["url"]}
    assert all(url.startswith(metadata["url"]) for url in metadata["project_urls"].values())


def test_the_version_and_its_date_are_the_same_everywhere(metadata: dict[str, Any]) -> None:
    version, date = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", text("CHANGELOG.md"), re.MULTILINE)[0]
    assert metadata["version"] == modeling_mistral_large.__version__ == version
    assert f"\nversion: {version}\n" in text("CITATION.cff")
    assert f'\ndate-released: "{date}"\n' in text("CITATION.cff")


def test_the_page_of_an_index_has_no_relative_link(metadata: dict[str, Any]) -> None:
    targets = re.findall(r"\]\(([^)]+)\)", metadata["long_description"])
    assert len(targets) > 20
    assert [target for target in targets if not target.startswith("https://")] == []
    assert "![A conversation with a tool call" in metadata["long_description"]
    assert f"]({metadata['url']}/raw/main/docs/pictures/conversation.svg)" in metadata["long_description"]


def test_every_requirement_has_a_lower_bound(metadata: dict[str, Any]) -> None:
    extras = [requirement for extra in metadata["extras_require"].values() for requirement in extra]
    assert [each for each in [*metadata["install_requires"], *extras] if ">=" not in each] == []


def test_pre_commit_runs_the_locked_ruff() -> None:
    (locked,) = re.findall(r"^ruff==(.+)$", text("constraints.txt"), re.MULTILINE)
    assert f"rev: v{locked}\n" in text(".pre-commit-config.yaml")


def row(label: str) -> str:
    """The row of the README's comparison that begins so."""
    (found,) = re.findall(rf"^\| {re.escape(label)}.*$", text("README.md"), re.MULTILINE)
    return str(found)


def results(name: str) -> Any:
    return json.loads(text(f"benchmarks/results/{name}.json"))


def in_words(values: list[str]) -> str:
    return f"{', '.join(values[:-1])} and {values[-1]}"


def test_the_figures_of_the_prompts_are_those_of_the_results() -> None:
    ways = [workload["ways"] for workload in results("chat")["prompts"].values()]
    ours = [way["mistral-common"]["ours against it"] for way in ways]
    theirs = [way["mistral-common"]["ours against it"] / way["transformers"]["ours against it"] for way in ways]
    assert f"| {in_words([f'{each:.1f}' for each in ours])} × mistral-common |" in row("prompts a second")
    assert f"| {in_words([f'{each:.1f}' for each in theirs])} × mistral-common |" in row("prompts a second")


def test_the_figures_of_exactness_are_those_of_the_results() -> None:
    prompts = results("exactness")["prompts"]
    labels = {"same prompt ids": "plain", "… with unusual": "unusual", "… with control": "adversarial"}
    for label, kind in labels.items():
        same, count = prompts[kind]["vendor's template"]
        assert f"| {100 * prompts[kind]['ours'][0] / prompts[kind]['ours'][1]:.0f} % |" in row(label)
        assert f"| {100 * same / count:.1f} %" in row(label)


def test_the_figures_of_converting_are_those_of_the_results() -> None:
    warm = [result for result in results("convert")["results"] if result["cache"] == "warm"]
    copy = "cp -r, to the disk"
    speeds = [f"{result['speed_of_convert_by_that_of'][copy]:.2f}" for result in warm]
    assert f"| {in_words(speeds)} × `cp -r` |" in row("speed of converting")
    of_the_command = [f"{result['speed_of_the_process_by_that_of'][copy]:.2f}" for result in warm]
    assert f"| {in_words(of_the_command)} × `cp -r` |" in row("the same of the command")
    memory = [f"{result['peak_bytes_above_imports']['convert'] / 1e6:.0f}" for result in warm]
    assert f"| {in_words(memory)} MB |" in row("memory to convert")


def test_the_picture_of_the_prompts_is_that_of_the_results() -> None:
    # The longest bar ends at the top of the axis: 6.7, under a tick of 6.
    picture = text("benchmarks/results/chat.svg")
    assert "<!-- 6 -->" in picture
    assert "<!-- 8 -->" not in picture
