"""Edits of the files of a folder, for tests that damage one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Edit = Callable[[Path], object]


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def set_json(path: Path, /, **settings: Any) -> None:
    edit_json(path, lambda content: content.update(settings))


def setting(name: str, /, **settings: Any) -> Edit:
    return lambda folder: set_json(folder / name, **settings)


def content(name: str, data: bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(data)


def remove(*names: str) -> Edit:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def replace(name: str, make: Edit) -> Edit:
    """Remove a file, and make something else of its name."""

    def act(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return act
