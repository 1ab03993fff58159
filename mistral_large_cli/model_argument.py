"""What `chat` and `serve` take for a model, checked before torch is imported."""

from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.adapter_folder import (
    adapter_layout,
    refuse_second_adapter,
    require_adapter,
    vendors_adapter_problem,
)
from mistral_large_conversion.checkpoint.hub import is_repository_id, reachable_options, refuse_adapter
from mistral_large_conversion.checkpoint.layout import CONFIG_NAMES, layouts_of
from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME, LORA_NAME
from mistral_large_conversion.errors import CheckpointError, SettingError

from .generation_session import is_parallel


def check_model(model: str, hub: dict[str, Any], device_map: str | None, adapter: str | None = None) -> None:
    """Refuse what no model can be loaded from, before torch is imported.

    Raises:
        CheckpointError: no folder and no repository, a folder without a checkpoint, or an adapter that is none or a
            second one.
        SettingError: a device map for a process that has one GPU.
    """

    if is_parallel() and device_map is not None:
        raise SettingError("--device-map: under torchrun each process has its own GPU; leave it out")
    reachable_options(model, hub)
    folder = Path(model)
    if folder.is_dir() and (folder / LORA_NAME).exists():
        # It names no base that could be loaded, and its params.json is that of the base.
        refuse_adapter(folder, name=model)
        raise CheckpointError(f"{model}: {vendors_adapter_problem(folder)}")
    if folder.exists() and not layouts_of(folder) and not (folder / ADAPTER_CONFIG_NAME).exists():
        raise CheckpointError(
            f"{model}: no checkpoint; a folder of one has {' or '.join(CONFIG_NAMES.values())}; give such a folder, or "
            "a repository on the hub as owner/name"
        )
    if adapter is not None:
        check_adapter(model, adapter)


def check_adapter(model: str, adapter: str) -> None:
    """Refuse an adapter that is none, and one for a folder that has its own, before torch is imported.

    Raises:
        CheckpointError: such an adapter.
    """

    folder, base = Path(adapter), Path(model)
    if folder.exists() or not is_repository_id(adapter):
        require_adapter(folder)
    is_own = folder.exists() and base.exists() and folder.samefile(base)
    if base.is_dir() and not is_own and adapter_layout(base) is not None:
        refuse_second_adapter(model, adapter, base)
