"""Loading of adapters: folders or repositories that hold one instead of a checkpoint, and adapters on a given base."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from mistral_large_conversion.adapter_formats import convert_adapter
from mistral_large_conversion.checkpoint.adapter import check_shapes, read_adapter
from mistral_large_conversion.checkpoint.adapter_folder import (
    adapter_layout,
    is_other_base,
    refuse_second_adapter,
    require_adapter,
    vendors_adapter_problem,
)
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.hub import HUB_OPTIONS, find_consolidated, is_repository_id, resolve_adapter
from mistral_large_conversion.checkpoint.params import PARAMS_NAME
from mistral_large_conversion.checkpoint.source_files import (
    ADAPTER_CONFIG_NAME,
    read_adapter_base,
    read_json_object,
)
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError
from mistral_large_conversion.vocabulary import VOCABULARY_NAMES, find_vocabulary
from modeling_mistral_large.configuration_mistral_large import POSITIVE

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


def find_tokenizer_file(source: Any, options: Mapping[str, Any]) -> Path | None:
    """Where the tokenizer of a consolidated checkpoint or of an adapter is, or None if it is in `source` itself.

    Of a consolidated checkpoint, the file is read alone: the vendor's folder also has a tokenizer.json and a template
    of its own, which are not exact. An adapter that was saved without a tokenizer has the one of its base.
    """
    folder = find_consolidated(source, options, patterns=(PARAMS_NAME, *VOCABULARY_NAMES[:-1]))
    if folder is not None:
        file = find_vocabulary(folder)
        return file if file is not None and file.exists() else None
    base = base_tokenizer(source, options)
    return None if base is None else find_tokenizer_file(base, {}) or Path(base)


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


def load_on_base(
    model_class: Any, source: Any, adapter: Any, *model_args: Any, adapter_name: str = "default", **options: Any
) -> Any:
    """The model of `source` with the adapter of `adapter`, PEFT's or the vendor's lora.safetensors.

    source: a folder of either layout or a hub repository; `options` are those of `from_pretrained` for it. Those that
        say where the hub is are also the adapter's, `revision` and `subfolder` are not.

    Raises:
        CheckpointError: no adapter, one that does not fit the base, or one next to one that `source` has already.
        MissingLibraryError: PEFT is not installed.
    """
    hub_options = {name: options[name] for name in ("token", "cache_dir", "local_files_only") if options.get(name)}
    folder, _ = resolve_adapter(adapter, **hub_options)
    if Path(source).is_dir() and Path(source).resolve() == folder.resolve():
        # It is loaded with the checkpoint, or with its base.
        return model_class.from_pretrained(source, *model_args, **options)
    require_adapter(folder)
    refuse_second_adapter(source, adapter, adapter_folder(source, options))
    needs_peft(adapter)
    loaded = model_class.from_pretrained(source, *model_args, **options)
    has_info = options.get("output_loading_info")
    put_adapter_on(loaded[0] if has_info else loaded, folder, adapter_name=adapter_name)
    return loaded


def named_base(adapter: Any, source: Any, options: Mapping[str, Any]) -> str | None:
    """The base that an adapter names where it is called otherwise than `source`, which may still be the same."""
    folder = adapter_folder(adapter, options)
    if folder is None:
        return None
    try:
        base = read_adapter_base(folder)
    except CheckpointError:
        # It names none, or cannot be read, which loading it says.
        return None
    return base if is_other_base(base, source) else None


def put_adapter_on(model: Any, folder: Path, *, adapter_name: str = "default") -> None:
    """Load the adapter of a folder, of PEFT or the vendor's, on a model of ours.

    Raises:
        CheckpointError: an adapter that does not fit the model.
    """
    config = model.config
    sizes = {name: getattr(config, name) for name in POSITIVE}
    geometry = Geometry(**sizes, rope_theta=config.rope_parameters["rope_theta"])
    if adapter_layout(folder) == "hf":
        if read_json_object(folder / ADAPTER_CONFIG_NAME).get("peft_type") == "LORA":
            check_shapes(folder, geometry)
        model.load_adapter(str(folder), adapter_name=adapter_name)
        return
    read_adapter(folder, geometry)
    with TemporaryDirectory() as temporary:
        converted = Path(temporary, "adapter")
        convert_adapter(folder, converted, to="hf")
        model.load_adapter(str(converted), adapter_name=adapter_name)


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


def refuse_vendors_adapter(source: Any, options: Mapping[str, Any]) -> None:
    """Refuse a local checkpoint with the vendor's adapter next to it, of which params.json does not say the scaling.

    Raises:
        CheckpointError: it would be left out.
    """
    if source is None:
        return
    if problem := vendors_adapter_problem(Path(source, options.get("subfolder") or "")):
        raise CheckpointError(f"{source}: {problem}")


def load_own_adapter(model: Any, folder: Path) -> None:
    """Load PEFT's adapter next to a checkpoint, if there is one, as transformers does in the HF layout."""
    if (folder / ADAPTER_CONFIG_NAME).exists():
        needs_peft(folder)
        model.load_adapter(str(folder))
