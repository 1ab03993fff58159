"""Loading of a folder or repository that holds an adapter of PEFT instead of a checkpoint."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import find_adapter_config_file

from mistral_large_conversion.checkpoint.hub import HUB_OPTIONS, is_repository_id, read_adapter_base
from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError


def adapter_base(source: Any, options: Mapping[str, Any]) -> str | None:
    """The checkpoint that the adapter in `source` is for, or None where that holds no adapter or a checkpoint, too.

    `source` and `options` are those of `from_pretrained`.

    Raises:
        CheckpointError: an adapter whose file names no base.
        MissingLibraryError: an adapter, and PEFT is not installed.
    """
    if source is None or options.get("gguf_file"):
        return None
    folder = Path(source, options.get("subfolder") or "")
    if not folder.is_dir():
        if not is_repository_id(str(source)):
            return None
        wanted = {name: options[name] for name in (*HUB_OPTIONS, "subfolder") if options.get(name)}
        file = find_adapter_config_file(str(source), **wanted)
        if file is None:
            return None
        folder = Path(file).parent
    if (folder / CONFIG_NAME).exists():
        return None
    base = read_adapter_base(folder)
    if base is not None:
        needs_peft(source)
    return base


def needs_peft(source: Any) -> None:
    """Raise a MissingLibraryError if PEFT is not installed, without which transformers passes over an adapter."""
    if find_spec("peft") is None:
        raise MissingLibraryError(f"{source}: has an adapter, which needs PEFT; pip install peft")


def load_with_adapter(
    model_class: Any, base: str, source: Any, *model_args: Any, adapter_name: str = "default", **options: Any
) -> Any:
    """The model of `base` with the adapter of `source`; `options` are those of `from_pretrained`.

    Raises:
        CheckpointError: a base that is not there.
    """
    if not Path(base).is_dir() and not is_repository_id(base):
        raise CheckpointError(
            f"{source}: an adapter for {base!r}, which is no folder here; load the base model from where it is, then "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    # These say where the adapter is; the base has a place of its own.
    place = {name: options.pop(name) for name in ("revision", "subfolder") if name in options}
    if Path(source).is_dir():
        # transformers 5.17 looks into the folder itself.
        source = Path(source, place.pop("subfolder", None) or "")
    hub_options = {name: options[name] for name in ("token", "cache_dir", "local_files_only") if options.get(name)}
    adapter_options = {**place, **hub_options, **(options.pop("adapter_kwargs", None) or {})}
    loaded = model_class.from_pretrained(base, *model_args, **options)
    has_info = options.get("output_loading_info")
    model = loaded[0] if has_info else loaded
    info = model.load_adapter(str(source), adapter_name=adapter_name, adapter_kwargs=adapter_options)
    return (model, info.to_dict()) if has_info else model


def load_own_adapter(model: Any, folder: Path) -> None:
    """Load the adapter next to a checkpoint, if there is one, as transformers does in the HF layout."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        needs_peft(folder)
        model.load_adapter(str(folder))
