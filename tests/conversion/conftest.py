"""What the tests of the converter share."""

import shutil
from pathlib import Path

import pytest

from tests.support.remembered import remembered_vocabularies as remembered_vocabularies


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    """The converted demo, to be damaged."""
    return Path(shutil.copytree(demo_folder, tmp_path / "hf"))
