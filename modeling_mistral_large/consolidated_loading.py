"""Loading of the vendor's consolidated layout without converting it first.

transformers renames and converts the tensors of a checkpoint one by one, by a table for each model type. Ours is
computed from the table of names, and its one operation puts the rows of query and key weights into the HF order.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from mistral_large_conversion.checkpoint.names import ROPE_PAIRS, TO_HF
from mistral_large_conversion.checkpoint.rope import split_rope_pairs
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES, FileTensor
from mistral_large_conversion.vocabulary import SPECIAL_IDS
from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.hf_loading import Unwrapping

# The last part of a name between renaming and conversion: no layout has it.
INTERLEAVED = "interleaved"


class SplitRopePairs(ConversionOps):
    """Query or key rows from the consolidated into the HF order.

    Heads are counted by the rows at hand: key weights have fewer than query weights, a rank's shard fewer still.
    """

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[torch.Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        ((weight,),) = input_dict.values()
        # A list again, because some quantizers, which come next, take the first of what they get.
        return {target_patterns[0]: [split_rope_pairs(weight, head_dim=kwargs["config"].head_dim)]}


def weight_conversions() -> list[WeightRenaming | WeightConverter]:
    """The renaming of consolidated names to those of the model, anchored: HF names pass through the table, too.

    First of all, names lose what training has put around modules.
    """
    renamings: list[WeightRenaming] = [Unwrapping()]
    for consolidated, hf in TO_HF.items():
        source = re.escape(consolidated).replace(re.escape("{layer}"), r"(\d+)")
        target = hf.format(layer=r"\1")
        if consolidated in ROPE_PAIRS:
            # A converter cannot name the layer: it only gets to see the end of the name.
            target = target.removesuffix("weight") + INTERLEAVED
        renamings.append(WeightRenaming(rf"^{source}$", target))
    return [*renamings, WeightConverter(rf"\.{INTERLEAVED}$", ".weight", operations=[SplitRopePairs()])]


def register_weight_conversions() -> None:
    """Make transformers know the table; may run any number of times."""
    register_checkpoint_conversion_mapping(MistralLargeConfig.model_type, weight_conversions(), overwrite=True)


def default_generation_config() -> GenerationConfig:
    """The generation config that a converted folder has."""
    return GenerationConfig(**SPECIAL_IDS)  # type: ignore[no-untyped-call]  # transformers types it in part


@contextmanager
def index_of(tensors: Sequence[FileTensor]) -> Iterator[Path]:
    """A folder that transformers can load, which holds nothing but an index of tensors in files elsewhere."""
    index = {
        "metadata": {"dtype": TORCH_NAMES[tensors[0].dtype]},
        "weight_map": {tensor.name: str(tensor.path.absolute()) for tensor in tensors},
    }
    with TemporaryDirectory() as folder:
        path = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
        path.write_text(json.dumps(index), encoding="utf-8")
        yield path.parent
