"""Loading of a folder of the HF layout, by whichever program: what is missing or of another shape is said beforehand.

transformers fills what a checkpoint lacks with random numbers, and says so in a table.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mistral_large_conversion.checkpoint.layout import WEIGHTS_STEM
from mistral_large_conversion.checkpoint.names import TO_HF, expected_tensors, unwrapped_name
from mistral_large_conversion.checkpoint.read import NO_PICKLES, read_weights, refuse
from mistral_large_conversion.errors import CheckpointError
from modeling_mistral_large.configuration_mistral_large import OPTIONS_OF_FILES, MistralLargeConfig

BASE_PREFIX = "model."
PICKLED = "pytorch_model*.bin"
HEAD = TO_HF["output.weight"]
BASE_NAMES = ("embed_tokens.weight", "norm.weight")


class Unwrapping(WeightRenaming):
    """Takes what training has put around modules out of names: `_orig_mod.`, `module.` and their like."""

    def __init__(self) -> None:
        # Patterns, which are not used, are asked for.
        super().__init__(source_patterns=r"^_orig_mod\.", target_patterns="")

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the name without them, and whether there were any, as transformers takes it: a pattern or None."""
        name = unwrapped_name(source_key)
        return name, None if name == source_key else self.source_patterns[0]


def check_folder(
    source: Any, config: PreTrainedConfig | Any, options: Mapping[str, Any], *, has_output_matrix: bool
) -> bool:
    """Check the headers of the weights in a local folder of the HF layout, and return whether nothing is left to check.

    Of quantized weights, names, shapes and dtypes are those of the quantization: see `refuse_unquantized`.

    config, options: those of `from_pretrained`.
    has_output_matrix: whether the model has `lm_head`, so that the checkpoint needs it; one of a model without a head
        has names of its own, and does not.

    Raises:
        CheckpointError: files that are missing, damaged or not whole, and tensors that are missing or of other shapes
            than the config says, all in one error.
    """
    folder = _folder(source, options)
    if folder is None:
        return False
    if pickled := _only_pickles(folder):
        raise CheckpointError(f"{source}: weights only in {pickled!r}: {NO_PICKLES}")
    if not isinstance(config, PreTrainedConfig):
        names = {*OPTIONS_OF_FILES, *MistralLargeConfig.__dataclass_fields__} - {"dtype", "quantization_config"}
        given = {name: options[name] for name in names & options.keys()}
        config = MistralLargeConfig.from_pretrained(source if config is None else config, **given)
    if getattr(config, "quantization_config", None) is not None:
        return True
    tensors, problems = read_weights(folder, "hf")
    if not problems and not (folder / SAFE_WEIGHTS_NAME).exists() and not (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        problems = [f"{SAFE_WEIGHTS_INDEX_NAME} is missing, by which transformers finds the tensors of several files"]
    if not problems:
        # Without a readable file, every tensor of it would be listed as missing, too.
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        has_prefix = any(name.startswith(BASE_PREFIX) for name in shapes)
        for tensor in expected_tensors(config):
            if tensor.hf == HEAD and not (has_output_matrix and has_prefix):
                continue
            name = tensor.hf if has_prefix else tensor.hf.removeprefix(BASE_PREFIX)
            if name not in shapes:
                problems.append(f"tensor {name!r} is missing")
            elif shapes[name] != tensor.shape and not options.get("ignore_mismatched_sizes"):
                problems.append(
                    f"tensor {name!r} has shape {list(shapes[name])}, config.json says {list(tensor.shape)}"
                )
    refuse(problems, f"{source} is not a complete checkpoint of its config.json")
    return True


def _folder(source: Any, options: Mapping[str, Any]) -> Path | None:
    """Return the local folder whose weights transformers is about to read, unless they are asked for as a pickle."""
    other = ("gguf_file", "variant", "state_dict", "from_tf", "from_flax")
    if source is None or options.get("use_safetensors") is False or any(options.get(name) for name in other):
        return None
    folder = Path(source, options.get("subfolder") or "")
    return folder if folder.is_dir() and (_has_safetensors(folder) or _only_pickles(folder)) else None


def _has_safetensors(folder: Path) -> bool:
    return any(folder.glob(f"{WEIGHTS_STEM['hf']}*.safetensors"))


def _only_pickles(folder: Path) -> str | None:
    """Return the name of a pickle of weights where there is nothing else."""
    return None if _has_safetensors(folder) else next((path.name for path in sorted(folder.glob(PICKLED))), None)


def refuse_made_up(model: PreTrainedModel, source: Any, missing: Collection[str]) -> None:
    """Refuse a model some of whose tensors transformers has filled with random numbers, but for a head to be trained.

    missing: the names of tensors that the checkpoint lacks.

    Raises:
        CheckpointError: the checkpoint of a whole model lacks some of the decoder's, or the output matrix.
    """
    is_without_head = any(name.endswith("Model") for name in model.config.architectures or ())
    made_up = sorted(
        name
        for name in missing
        if "layers." in name or name.endswith(BASE_NAMES) or (name == HEAD and not is_without_head)
    )
    if made_up:
        others = f" and {len(made_up) - 1} others" if len(made_up) > 1 else ""
        raise CheckpointError(
            f"{source}: tensor {made_up[0]!r}{others} missing, and random numbers would take the place; a checkpoint "
            "has all tensors of the model; load it with the config.json it was saved with, or download it again"
        )
