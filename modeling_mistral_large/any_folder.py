"""Any folder, one call: model and tokenizer, or a pipeline, of whatever folder or repository holds a Mistral Large."""

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer, MistralConfig, PreTrainedModel
from transformers import pipeline as transformers_pipeline

from modeling_mistral_large.adapter_loading import load_on_base
from modeling_mistral_large.configuration_mistral_large import (
    OPTIONS_OF_BOTH,
    OPTIONS_OF_FILES,
    OVERRIDES_WITHOUT_A_FIELD,
    MistralLargeConfig,
)
from modeling_mistral_large.errors import KeywordError, UnknownVocabularyError
from modeling_mistral_large.modeling_mistral_large import MistralLargeForCausalLM
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.transformers_api.keywords import declared_options, refuse_unknown_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextGenerationPipeline

# What `from_pretrained` takes besides those that it declares and the fields of the config; transformers documents them.
OPTIONS_OF_MODELS = (
    *("dtype", "torch_dtype", "device_map", "max_memory", "offload_folder", "offload_buffers"),
    *("quantization_config", "attn_implementation", "use_kernels", "kernel_config"),
    *("tp_plan", "tp_size", "device_mesh", "distributed_config"),
    *("variant", "use_safetensors", "generation_config", "state_dict", "key_mapping", "low_cpu_mem_usage"),
    *("trust_remote_code", "adapter_name", "adapter_kwargs"),
)
# `load` returns two things, whatever else `from_pretrained` would return.
OPTIONS_WITHOUT_A_PLACE = ("output_loading_info", "return_unused_kwargs")


def load(
    source: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None, **options: Any
) -> tuple[PreTrainedModel, "PreTrainedTokenizerBase"]:
    """Load the model and the tokenizer of a folder, or of a repository on the hub as owner/name.

    source: the vendor's folder, in one layout or both; a snapshot in the hub's cache; what `convert` or
        `save_pretrained` wrote; a fine-tune or merge of type `mistral`; an adapter of PEFT.
    adapter: a LoRA to be loaded on the model, a folder or repository of PEFT's format or with the vendor's
        lora.safetensors.
    options: those of `MistralLargeForCausalLM.from_pretrained`; the ones that say where the files are hold for the
        tokenizer, too.

    The tokenizer is a `MistralLargeTokenizer` where the vocabulary is one of the vendor's, under whatever name and of
    whatever program. Of any other vocabulary it is transformers' own, and a warning says what is then not exact.

    Raises:
        KeywordError: an option that nothing takes.
        CheckpointError: no checkpoint of a Mistral Large, or one that is not whole; no adapter that fits.
        MissingLibraryError: an adapter, and PEFT is not installed.
        TokenizerFileError: no tokenizer, or a damaged one.
    """
    _refuse_unknown("load", options)
    place = {name: options[name] for name in OPTIONS_OF_BOTH if name in options}
    # First, as it takes no time: what is wrong with it is said before 245 GB are read.
    tokenizer = load_tokenizer(source, place)
    model: PreTrainedModel = (
        MistralLargeForCausalLM.from_pretrained(source, **options)
        if adapter is None
        else load_on_base(MistralLargeForCausalLM, source, adapter, **options)
    )
    return model, tokenizer


def pipeline(
    source: str | os.PathLike[str], *, adapter: str | os.PathLike[str] | None = None, **options: Any
) -> "TextGenerationPipeline":
    """Return the text-generation pipeline of a folder or repository.

    source, adapter, options, errors: see `load`.
    """
    _refuse_unknown("pipeline", options)
    model, tokenizer = load(source, adapter=adapter, **options)
    # transformers types its overloads for the classes of its own tokenizers.
    made: Any = transformers_pipeline
    chat: TextGenerationPipeline = made("text-generation", model=model, tokenizer=tokenizer)
    return chat


def load_tokenizer(source: str | os.PathLike[str], place: Mapping[str, Any]) -> "PreTrainedTokenizerBase":
    """Return our tokenizer of a folder or repository or, of a vocabulary that is none of the vendor's, transformers'.

    place: options of `from_pretrained` that say where the files are.
    """
    try:
        return MistralLargeTokenizer.from_pretrained(source, **place)
    except UnknownVocabularyError as error:
        # With a config of stock Mistral, or AutoTokenizer would ask our class again.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, config=MistralConfig(), **place)
        warnings.warn(
            f"{source}: the vocabulary is none of the vendor's ({str(error).partition(';')[0]}), so the tokenizer is "
            f"transformers' own {type(tokenizer).__name__}: its ids are those of its own program, control strings that "
            "a user writes become control tokens, and tool calls are not parsed",
            stacklevel=3,
        )
        return tokenizer


def _refuse_unknown(function: str, options: Mapping[str, Any]) -> None:
    for name in OPTIONS_WITHOUT_A_PLACE:
        if name in options:
            raise KeywordError(
                f"{function}() got {name}, which would change what it returns; call "
                "MistralLargeForCausalLM.from_pretrained for it"
            )
    known = {
        *declared_options(PreTrainedModel.from_pretrained),
        *MistralLargeConfig.__dataclass_fields__,
        *OPTIONS_OF_FILES,
        *OPTIONS_OF_MODELS,
        *OVERRIDES_WITHOUT_A_FIELD,
    }
    refuse_unknown_options(function, options, {name for name in known if not name.startswith("_")})
