"""Configs that are saved with the module of `mistral_large_conversion.checkpoint.remote_code`, and name it."""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from mistral_large_conversion.checkpoint.remote_code import IN_CONFIG, REMOTE_CODE, REMOTE_CODE_NAME


def write_remote_code(folder: str | os.PathLike[str]) -> str:
    """Write the module into a folder, which must exist, and return the path of the file."""
    path = Path(folder) / REMOTE_CODE_NAME
    path.write_bytes(REMOTE_CODE)
    return str(path)


class ConfigWithRemoteCode(PreTrainedConfig):  # type: ignore[no-untyped-call]  # transformers' is not typed
    """A config whose file names the module, and which is saved with it."""

    # TRL and transformers look it up in a config in memory.
    auto_map: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        """Drop what a file says of the module, so that no other one is named when the config is saved again."""
        kwargs = {name: value for name, value in kwargs.items() if name not in IN_CONFIG}
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]  # transformers' is not typed

    def to_json_file(self, json_file_path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Write the fields to a file, and next to it the module that the file names."""
        settings = json.loads(self.to_json_string(use_diff)) | IN_CONFIG
        Path(json_file_path).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_remote_code(Path(json_file_path).parent)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy the source of this package into folders, instead of the module."""
