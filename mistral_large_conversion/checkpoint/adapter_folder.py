"""Folders of LoRA adapters: which files one of each format has, and what of it lies next to a checkpoint."""

from pathlib import Path

from mistral_large_conversion.checkpoint.layout import Layout
from mistral_large_conversion.checkpoint.params import PARAMS_NAME
from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME, LORA_NAME, adapter_problem
from mistral_large_conversion.errors import CheckpointError

ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# By the layout whose names an adapter has: settings and weights.
FILES: dict[Layout, tuple[str, str]] = {
    "hf": (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME),
    "consolidated": (PARAMS_NAME, LORA_NAME),
}
# The file by which a folder is known to hold an adapter.
ADAPTER_MARKS: dict[Layout, str] = {"hf": ADAPTER_CONFIG_NAME, "consolidated": LORA_NAME}


def adapter_layout(folder: Path) -> Layout | None:
    """Return the format of the adapter in a folder, None where it holds none.

    Raises:
        CheckpointError: two adapters.
    """
    found = [layout for layout, name in ADAPTER_MARKS.items() if (folder / name).exists()]
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: holds two adapters, {ADAPTER_CONFIG_NAME} and {LORA_NAME}; only one is read, put each into a "
            "folder of its own"
        )
    return found[0] if found else None


def require_adapter(folder: Path) -> Layout:
    """Return the format of the adapter in a folder.

    Raises:
        CheckpointError: none, or two.
    """
    layout = adapter_layout(folder) if folder.is_dir() else None
    if layout is None:
        raise CheckpointError(
            f"{folder}: no adapter; give a folder with {ADAPTER_CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME} (PEFT), or "
            f"with {LORA_NAME} and {PARAMS_NAME} (the vendor's)"
        )
    return layout


def refuse_second_adapter(source: object, adapter: object, own: Path | None) -> None:
    """Refuse to load an adapter on what brings one of its own.

    own: the folder of the adapter in `source`, None where it has none.

    Raises:
        CheckpointError: there are two.
    """
    if own is not None:
        raise CheckpointError(
            f"{source}: has an adapter of its own, and {adapter} is another: one is loaded; give the base alone, or "
            "leave the other adapter out"
        )


def is_other_base(base: str | None, source: Path | str) -> bool:
    """Whether the base that an adapter names is not called as the checkpoint `source` is, which may still be it."""
    if base is None:
        return False
    if Path(base).is_dir() and Path(source).is_dir():
        return Path(base).resolve() != Path(source).resolve()
    return Path(base).name.lower() != Path(source).name.lower()


def vendors_adapter_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint that has the vendor's adapter next to it, which no loader applies, else None."""
    if not (folder / LORA_NAME).exists() or adapter_problem(folder) is not None:
        return None
    return (
        f"holds {LORA_NAME} next to the checkpoint, which would be left out; move it with the {PARAMS_NAME} of its "
        "training into a folder of its own, and give that as the adapter"
    )


def refuse_left_out(folder: Path, adapter: Path | None) -> None:
    """Refuse the adapter next to a checkpoint, unless it is the one that is merged.

    adapter: the folder of the one that is merged, if one is.

    Raises:
        CheckpointError: it would be left out, or there are two.
    """
    layout = adapter_layout(folder)
    if layout is None or (adapter is not None and adapter.resolve() == folder.resolve()):
        return
    mark = ADAPTER_MARKS[layout]
    if adapter is None:
        raise CheckpointError(
            f"{folder}: holds an adapter next to the checkpoint, which would be left out; merge it with --adapter "
            f"{folder}, or move {mark} elsewhere"
        )
    raise CheckpointError(
        f"{folder}: holds an adapter of its own next to the checkpoint, and {adapter} is another: one is "
        f"merged; give one of the two with --adapter, and move {mark} elsewhere if it is the other one"
    )
