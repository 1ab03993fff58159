"""Where transformers looks for classes, configs and pipelines, and the versions that are tested."""

import warnings
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from packaging.version import Version
from transformers import PreTrainedConfig
from transformers import __version__ as transformers_version
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)
from transformers.pipelines import SUPPORTED_TASKS
from transformers.utils.import_utils import _LazyModule

from modeling_mistral_large.supported import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS


def warn_outside_range(installed: str = transformers_version) -> None:
    """Warn when the installed transformers is older or newer than those that the test suite has passed on."""
    oldest, newest = Version(OLDEST_TRANSFORMERS).release, Version(NEWEST_TRANSFORMERS).release
    if not oldest <= Version(installed).release[:2] <= newest:
        warnings.warn(
            f"transformers {installed} is installed; modeling-mistral-large is tested with {OLDEST_TRANSFORMERS} to "
            f"{NEWEST_TRANSFORMERS}, and another version may give wrong results without an error: run "
            "`mistral-large doctor`, or install one of the range",
            UserWarning,
            stacklevel=2,
        )


def export_names(classes: Iterable[type]) -> None:
    """Make classes attributes of the module `transformers`, where pipelines, TRL, `serve` and vLLM look for them.

    When its class of modules changes, those tools find no class of that name. They are set on the class, since
    `import transformers.processing_utils` replaces the module that was imported before.
    """
    for each in classes:
        setattr(_LazyModule, each.__name__, _ExportedClass(each))


class _ExportedClass:
    """An attribute of the module `transformers`, and of none of the other modules of its class."""

    def __init__(self, exported: type) -> None:
        self._exported = exported

    def __get__(self, module: object, _: type | None = None) -> type:
        if getattr(module, "__name__", None) != "transformers":
            raise AttributeError(self._exported.__name__)
        return self._exported


def read_config_dict_with(read: Callable[[dict[str, Any], Any, dict[str, Any]], dict[str, Any] | None]) -> None:
    """Let `read` say what the Auto classes take for the config of a source; may run any number of times.

    read: gets what config.json says, empty where there is none, the source and the options, and returns a config of
        ours, or None for what config.json says.

    They ask `PreTrainedConfig.get_config_dict` for the model type before any class of ours is asked; a class of
    transformers' own asks its own config class, and gets what it always gets. When they ask something else, they find
    no model type in a consolidated folder, and say so, and load the vendor's other layout with stock classes.
    """
    original = PreTrainedConfig.__dict__["get_config_dict"].__func__
    original = getattr(original, "replaced", original)

    def get_config_dict(cls: Any, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        options = dict(kwargs)
        found, remaining = original(cls, source, **kwargs)
        if cls is PreTrainedConfig:
            found = read(found, source, options) or found
        return found, remaining

    get_config_dict.replaced = original  # type: ignore[attr-defined]  # a function takes any attribute
    PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[arg-type,assignment]  # mypy binds it


def prefer_tokenizer(model_type: str, tokenizer_class: type) -> None:
    """Make `AutoTokenizer` use a class of ours for a model type, whatever class tokenizer_config.json names.

    It looks both up in transformers' tables of names by model type: that of its tokenizers, and that of the types
    whose files on the hub name another class than the right one. When it does not, the vendor's HF layout gets the
    Llama tokenizer, whose ids are not exact.
    """
    TOKENIZER_MAPPING_NAMES[model_type] = tokenizer_class.__name__
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(model_type)


def register_pipeline(task: str, module: str, name: str) -> None:
    """Make `pipeline(task)` use a class of ours, without loading it where transformers itself loads classes by name.

    When it changes, the pipeline drops the space between a text and what the model goes on with.
    """
    entry: Any = SUPPORTED_TASKS[task]
    entry["impl"] = f"{module}.{name}" if isinstance(entry["impl"], str) else getattr(import_module(module), name)
