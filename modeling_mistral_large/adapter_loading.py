"""Loading of a folder or repository that holds an adapter of PEFT instead of a checkpoint."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from .conversion.hub import HUB_OPTIONS, is_repository_id
from .conversion.source_files import ADAPTER_CONFIG_NAME, read_adapter_base
from .errors import CheckpointError, MissingLibraryError
from .sentencepiece_bpe import VOCABULARY_NAMES

TOKENIZER_FILES = ("tokenizer.json", *VOCABULARY_NAMES)


def adapter_base(source: Any, options: Mapping[str, Any]) -> str | None:
    """The checkpoint that the adapter in `source` is for, or None where that holds no adapter or a checkpoint, too.

    `source` and `options` are those of `from_pretrained`.

    Raises:
        CheckpointError: an adapter whose file names no base.
        MissingLibraryError: an adapter, and PEFT is not installed.
    """
    folder = adapter_folder(source, options)
    if folder is None or _has_any(source, (CONFIG_NAME,), options):
        return None
    base = read_adapter_base(folder)
    if base is not None:
        needs_peft(source)
    return base


def adapter_folder(source: Any, options: Mapping[str, Any]) -> Path | None:
    """Return the folder of the adapter in `source`, or None where it holds none.

    Of a repository on the hub, it is that of the cache with the downloaded file that says what the adapter is for.
    """
    if source is None or options.get("gguf_file"):
        return None
    folder = Path(source, options.get("subfolder") or "")
    if folder.is_dir():
        return folder if (folder / ADAPTER_CONFIG_NAME).exists() else None
    if not is_repository_id(str(source)):
        return None
    wanted = {name: options[name] for name in (*HUB_OPTIONS, "subfolder") if options.get(name)}
    file = find_adapter_config_file(str(source), **wanted)
    return None if file is None else Path(file).parent


def base_tokenizer(source: Any, options: Mapping[str, Any]) -> str | None:
    """Return the base of the adapter in `source` if the adapter was saved without a tokenizer, else None.

    Raises:
        CheckpointError: the adapter's file names no base, or one that is not there.
    """
    adapter = adapter_folder(source, options)
    if adapter is None or _has_any(source, TOKENIZER_FILES, options):
        return None
    base = read_adapter_base(adapter)
    if base is not None:
        _check_base(source, base)
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
    _check_base(source, base)
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


def _has_any(source: Any, names: Sequence[str], options: Mapping[str, Any]) -> bool:
    """Whether a folder or a repository holds one of these files."""
    subfolder = options.get("subfolder") or ""
    wanted = {name: options[name] for name in HUB_OPTIONS if options.get(name)}
    return any(has_file(source, f"{subfolder}/{name}" if subfolder else name, **wanted) for name in names)


def _check_base(source: Any, base: str) -> None:
    if not Path(base).is_dir() and not is_repository_id(base):
        raise CheckpointError(
            f"{source}: an adapter for {base!r}, which is no folder here; load the base model from where it is, then "
            "peft.PeftModel.from_pretrained(model, folder)"
        )


def load_own_adapter(model: Any, folder: Path) -> None:
    """Load the adapter that lies beside a checkpoint, if there is one, as transformers does in the HF layout."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        needs_peft(folder)
        model.load_adapter(str(folder))
