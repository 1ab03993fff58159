"""The two ways between a consolidated checkpoint and the HF layout, whole folders at a time."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.conversion.destination import check_destination, json_bytes, unfinished, whole_file
from modeling_mistral_large.conversion.model_card import licence_files, model_card
from modeling_mistral_large.conversion.params import PARAMS_NAME, params_from_config
from modeling_mistral_large.conversion.plan import (
    DEFAULT_SHARD_SIZE,
    TOKENIZER_NAME,
    ConversionPlan,
    plan_conversion,
    plan_export_of_state_dict,
)
from modeling_mistral_large.conversion.safetensors_header import TORCH_NAMES
from modeling_mistral_large.conversion.stream import Progress, write_weights
from modeling_mistral_large.conversion.tokenizer import tokenizer_files
from modeling_mistral_large.errors import DestinationError, MistralLargeError

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "MistralLargeForCausalLM"


def convert_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Convert the consolidated checkpoint in `source` to the HF layout in `destination`, bit for bit.

    Weights, config, tokenizer, chat template, model card and licence files are written; `source` is only read.
    Licence files of the source are copied; a source without any is taken for the vendor's weights, see `licence_files`.
    An interrupted conversion is completed by running it again. `progress` is told the bytes of tensors as they come.

    Raises:
        CheckpointError: a source that is not a complete, sound checkpoint.
        TokenizerFileError: a tokenizer file that is not the v3 one.
        DestinationError: a destination that is not new, empty or unfinished, or has no room.
    """
    source, destination = Path(source), Path(destination)
    plan = plan_conversion(source, max_shard_size=max_shard_size)
    licences = licence_files(source)
    config = deepcopy(plan.config)
    config.architectures = [ARCHITECTURE]
    config.dtype = TORCH_NAMES[plan.dtype]
    generation_config = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small_files = {
        **tokenizer_files(source, vocab_size=plan.config.vocab_size),
        **licences,
        "README.md": model_card(licences).encode(),
        "config.json": config.to_json_string().encode(),
        "generation_config.json": json_bytes(generation_config),
    }
    _write(plan, source, destination, small_files, progress)
    return plan


def export_checkpoint(
    source: "Path | str | Mapping[str, torch.Tensor]",
    destination: Path | str,
    *,
    config: MistralLargeConfig | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Write a checkpoint of the HF layout to `destination` in the consolidated layout: the way back, bit for bit.

    `source` is a folder, whose tokenizer.model.v3 and licence files go along, or a state dict, which needs its `config`
    and of which only the weights and params.json are written.

    Raises:
        CheckpointError: a source that is not a complete, sound checkpoint.
        DestinationError: a destination that is not new, empty or unfinished, or has no room.
    """
    destination = Path(destination)
    folder = Path(source) if isinstance(source, Path | str) else None
    if folder is not None:
        plan = plan_conversion(folder, to="consolidated", max_shard_size=max_shard_size)
        small_files = {TOKENIZER_NAME: (folder / TOKENIZER_NAME).read_bytes(), **licence_files(folder)}
    else:
        assert isinstance(source, Mapping)
        if config is None:
            raise TypeError("export_checkpoint() of a state dict needs its config")
        plan = plan_export_of_state_dict(source, config, max_shard_size=max_shard_size)
        small_files = {}
    small_files[PARAMS_NAME] = json_bytes(params_from_config(plan.config))
    _write(plan, folder, destination, small_files, progress)
    return plan


def _write(
    plan: ConversionPlan,
    source: Path | None,
    destination: Path,
    small_files: dict[str, bytes],
    progress: Progress | None,
) -> None:
    check_destination(source, destination, plan.file_bytes + sum(map(len, small_files.values())))
    try:
        with unfinished(destination):
            for name, content in small_files.items():
                with whole_file(destination / name) as out:
                    out.write(content)
            write_weights(plan, destination, progress)
    except MistralLargeError:
        raise
    except OSError as error:
        raise DestinationError(f"{destination}: not finished: {error}; when that is mended, run it again") from error
