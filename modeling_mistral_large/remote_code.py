"""How programs that do not import this package find it: a small module in each saved folder, and where it is named.

`trust_remote_code=True` runs the module, which imports the classes from the installed package. Without it, the Auto
classes of transformers refuse a folder that names a module. They would read its tokenizer with a stock class otherwise,
for which `[INST]` in a text is the control token.
"""

import json
import os
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig

DISTRIBUTION = "modeling-mistral-large"
MODULE = "modeling_mistral_large_remote"
REMOTE_CODE_NAME = f"{MODULE}.py"
CONFIG_CLASS, TOKENIZER_CLASS = "MistralLargeConfig", "MistralLargeTokenizer"
MODEL_CLASSES = {
    "AutoModel": "MistralLargeModel",
    "AutoModelForCausalLM": "MistralLargeForCausalLM",
    "AutoModelForQuestionAnswering": "MistralLargeForQuestionAnswering",
    "AutoModelForSequenceClassification": "MistralLargeForSequenceClassification",
    "AutoModelForTokenClassification": "MistralLargeForTokenClassification",
}
# What config.json says of it besides the geometry. The class of a config in memory is known: there it says nothing.
IN_CONFIG: dict[str, Any] = {
    "auto_map": {auto: f"{MODULE}.{name}" for auto, name in {"AutoConfig": CONFIG_CLASS, **MODEL_CLASSES}.items()},
    "library_name": DISTRIBUTION,
}
# The second of the two is the class that the tokenizers library backs; there is no other.
TOKENIZER_AUTO_MAP: dict[str, Any] = {"AutoTokenizer": [None, f"{MODULE}.{TOKENIZER_CLASS}"]}

_NAMES = "".join(f"    {name},\n" for name in sorted([CONFIG_CLASS, TOKENIZER_CLASS, *MODEL_CLASSES.values()]))
REMOTE_CODE = f'''\
"""The classes of this checkpoint, from the package that it needs: pip install {DISTRIBUTION}"""

from modeling_mistral_large import (  # noqa: F401
{_NAMES})
'''.encode()


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
