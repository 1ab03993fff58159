"""Which folders of `model_type: mistral` transformers' Auto classes read as ours once the library is imported."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What says Mistral Large in the name of a repository or a folder, in any case.
NAME = "mistral-large"
# Width and depth of the vendor's other models that are published in both layouts: 7B, Ministral, Nemo, Codestral.
OTHER_MODELS = ((4096, 32), (4096, 36), (5120, 40), (6144, 56))


def is_named_mistral_large(source: object) -> bool:
    """Whether the id of a repository, the name of a folder, or that of its repository in the hub's cache says so."""
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else ""
    path = Path(os.path.abspath(name))
    if path.exists():
        is_snapshot = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
        name = path.parent.parent.name if is_snapshot else path.name
    return NAME in name.rpartition("/")[2].lower()


def is_another_model(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has the width and depth of another model of the vendor."""
    return (config.get("hidden_size"), config.get("num_hidden_layers")) in OTHER_MODELS
