"""The weights of a folder or repository, of whichever layout a model would be loaded from."""

from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.hub import CONSOLIDATED_FILES, HF_FILES, find_consolidated, resolve_source
from mistral_large_conversion.checkpoint.layout import is_consolidated
from mistral_large_conversion.checkpoint.read import Checkpoint, read_checkpoint
from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME, LORA_NAME
from mistral_large_conversion.errors import CheckpointError


def open_checkpoint(source: Path | str, **hub_options: Any) -> Checkpoint:
    """Read the headers of the checkpoint that `from_pretrained` would load from a folder or repository.

    Where there are both layouts it is the consolidated one. Quantized weights and weights of several dtypes are taken.

    hub_options: those of `resolve_source`.

    Raises:
        CheckpointError: no checkpoint, one that is not whole, or one with an adapter next to it.
    """
    folder = find_consolidated(source, hub_options, patterns=CONSOLIDATED_FILES)
    if folder is None:
        folder = resolve_source(source, patterns=HF_FILES, **hub_options)
    checkpoint = read_checkpoint(
        folder,
        "consolidated" if is_consolidated(folder) else "hf",
        needs_tokenizer=False,
        may_mix_dtypes=True,
        may_be_quantized=True,
    )
    for name in (ADAPTER_CONFIG_NAME, LORA_NAME):
        if (folder / name).exists():
            raise CheckpointError(
                f"{source}: holds an adapter ({name}) next to the checkpoint, which belongs to the model; layers are "
                "read of whole checkpoints; merge it with `mistral-large convert --adapter`, or move it away"
            )
    return checkpoint
