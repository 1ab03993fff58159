"""What says it does without transformers does without it: .ci/run leaves it out where only its version differs."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import UPPER_FLOORS

TESTS = Path(__file__).parents[1]
MODULES = sorted(
    path for path in TESTS.rglob("test_*.py") if "\npytestmark" in (text := path.read_text()) and "ground_floor" in text
)


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports where it is imported, and those that helpers of the tests import for it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{name}" for name in names)]
        for name in names:
            yield name
            helper = TESTS.parent.joinpath(*name.split(".")).with_suffix(".py")
            if name.startswith("tests.") and helper.exists():
                yield from imported(helper)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_of_the_ground_floor_imports_nothing_from_above(path: Path) -> None:
    assert not [name for name in imported(path) if name.split(".")[0] in UPPER_FLOORS]


def test_there_are_some() -> None:
    assert len(MODULES) >= 7


@pytest.mark.ground_floor
@pytest.mark.parametrize("name", ["transformers", "transformers.models", "modeling_mistral_large.errors"])
def test_a_test_of_the_ground_floor_can_import_nothing_from_above(name: str) -> None:
    with pytest.raises(ImportError):
        __import__(name)


def test_other_tests_can() -> None:
    assert all(sys.modules.get(name, sys) is not None for name in UPPER_FLOORS)
    __import__("transformers")
