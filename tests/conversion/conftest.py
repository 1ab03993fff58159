"""What the tests of the converter share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.remembered import remembered_vocabularies as remembered_vocabularies

_fsync = os.fsync


@pytest.fixture(scope="package", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Sync no file: what a killed process has written is there all the same, and no test cuts the power.

    Tests of the order in which a conversion syncs and renames put their own function in the place of this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture
def waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sync files all the same, where the time that a conversion takes for each of them matters."""
    monkeypatch.setattr(os, "fsync", _fsync)


@pytest.fixture
def folder(demo_folder: Path, tmp_path: Path) -> Path:
    """The converted demo, to be damaged."""
    return Path(shutil.copytree(demo_folder, tmp_path / "hf"))
