"""Loading of the vendor's consolidated layout as it is, without converting it first.

transformers renames and converts the tensors of a checkpoint one by one, by a table for each model type. Ours is
computed from the table of names, and its one operation puts the rows of query and key weights into the HF order.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from transformers import GenerationConfig
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .adapter_loading import base_tokenizer
from .configuration_mistral_large import MistralLargeConfig
from .conversion.hf_files import SPECIAL_IDS
from .conversion.hub import HUB_OPTIONS, is_repository_id, resolve_source
from .conversion.names import ROPE_PAIRS, TO_HF
from .conversion.params import PARAMS_NAME, config_from_params
from .conversion.plan import CONFIG_NAMES, TOKENIZER_NAME
from .conversion.rope import split_rope_pairs
from .conversion.safetensors_header import TORCH_NAMES, FileTensor
from .conversion.source_files import file_finding, read_json_object
from .errors import CheckpointError
from .sentencepiece_bpe import find_vocabulary

WEIGHT_PATTERN = "consolidated*.safetensors"
# The last part of a name between renaming and conversion: no layout has it.
INTERLEAVED = "interleaved"


class SplitRopePairs(ConversionOps):
    """Query or key rows from the consolidated into the HF order.

    Heads are counted by the rows at hand: key weights have fewer than query weights, a rank's share fewer still.
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
    """The way of each consolidated name to the name in the model, anchored: HF names pass through the table, too."""
    renamings = []
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


def is_consolidated(folder: Path) -> bool:
    """Whether a folder is read in the consolidated layout: where it has both, as the vendor's has, the other is not."""
    if any(folder.glob(WEIGHT_PATTERN)):
        return True
    return (folder / PARAMS_NAME).exists() and not (folder / CONFIG_NAMES["hf"]).exists()


def find_consolidated(
    source: Any, options: Mapping[str, Any], *, patterns: Sequence[str] = (PARAMS_NAME,)
) -> Path | None:
    """The folder of a consolidated checkpoint, or None where `source` is anything else, for transformers to judge.

    A repository on the hub is consolidated if it has a params.json; of its other files those of `patterns` are
    downloaded. `options` are those of `from_pretrained`.

    Raises:
        CheckpointError: the files cannot be downloaded, and what to do about it.
    """
    if source is None or options.get("gguf_file") or options.get("variant") or options.get("use_safetensors") is False:
        return None
    subfolder = options.get("subfolder") or ""
    folder = Path(source, subfolder)
    if folder.is_dir():
        return folder if is_consolidated(folder) else None
    repository = str(source)
    if subfolder or Path(source).exists() or not is_repository_id(repository):
        return None
    hub_options = {name: options[name] for name in HUB_OPTIONS if options.get(name)}
    try:
        folder = Path(hf_hub_download(repository, PARAMS_NAME, **hub_options)).parent
    except Exception:
        # No such file, no access or no network: transformers, which asks for its own files next, has words for it.
        return None
    if set(patterns) == {PARAMS_NAME}:
        return folder
    return resolve_source(repository, patterns=patterns, **hub_options)


def find_tokenizer_file(source: Any, options: Mapping[str, Any]) -> Path | None:
    """Where the tokenizer of a consolidated checkpoint or of an adapter is, or None if it is in `source` itself.

    Of a consolidated checkpoint, the file is read alone: the vendor's folder also has a tokenizer.json and a template
    of its own, which are not exact. An adapter that was saved without a tokenizer has the one of its base.
    """
    folder = find_consolidated(source, options, patterns=(PARAMS_NAME, TOKENIZER_NAME))
    if folder is not None:
        file = find_vocabulary(folder)
        return file if file is not None and file.exists() else None
    base = base_tokenizer(source, options)
    return None if base is None else find_tokenizer_file(base, {}) or Path(base)


def read_config(folder: Path) -> MistralLargeConfig:
    """The config that params.json says.

    Raises:
        CheckpointError: a file that cannot be read, or another architecture.
    """
    if finding := file_finding(folder, PARAMS_NAME):
        raise CheckpointError(f"{folder}: {finding}; it holds the geometry of the weights, download it again")
    try:
        params = read_json_object(folder / PARAMS_NAME)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / PARAMS_NAME}: {error}; download it again") from error
    return config_from_params(params)


def default_generation_config(config: MistralLargeConfig) -> GenerationConfig:
    """The generation config that a converted folder has."""
    ids = {name: getattr(config, name) for name in SPECIAL_IDS}
    return GenerationConfig(**ids)  # type: ignore[no-untyped-call]  # transformers types it in part


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
