"""The small files beside the weights, in either layout."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mistral_large_conversion.chat_templates import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, PROMPT_FORMAT
from mistral_large_conversion.checkpoint.atomic_write import json_bytes
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.layout import (
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MODEL_CARD_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_NAME,
)
from mistral_large_conversion.checkpoint.params import PARAMS_NAME, ROPE_THETA, params_from_geometry
from mistral_large_conversion.checkpoint.quantization import Quantization, quantization_config
from mistral_large_conversion.checkpoint.remote_code import IN_CONFIG, REMOTE_CODE, REMOTE_CODE_NAME, TOKENIZER_AUTO_MAP
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES
from mistral_large_conversion.model_card import ModelType, model_card
from mistral_large_conversion.tokenizer import tokenizer_files
from mistral_large_conversion.vocabulary import SPECIAL_IDS, find_vocabulary

ARCHITECTURES: dict[ModelType, str] = {"mistral_large": "MistralLargeForCausalLM", "mistral": "MistralForCausalLM"}
TOKENIZER_CLASSES: dict[ModelType, str] = {
    "mistral_large": "MistralLargeTokenizer",
    # Every transformers has a class of this name that takes tokenizer.json as it is.
    "mistral": "PreTrainedTokenizerFast",
}
# The tag `generation` is transformers' own: the template engines of other programs do not know it.
CHAT_TEMPLATES: dict[ModelType, str] = {"mistral_large": CHAT_TEMPLATE, "mistral": PLAIN_CHAT_TEMPLATE}


# What config.json says of every Mistral Large.
FIXED_SETTINGS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "use_cache": True,
}

# Files that only one of the model types has.
OWN_FILES: dict[ModelType, dict[str, bytes]] = {"mistral_large": {REMOTE_CODE_NAME: REMOTE_CODE}, "mistral": {}}

# What our classes have by themselves and stock ones must be told.
STOCK_TOKENIZER_SETTINGS: dict[str, Any] = {
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
    "padding_side": "left",
}


def hf_files(
    geometry: Geometry,
    *,
    quantization: Quantization | None,
    dtype: str,
    model_type: ModelType,
    source: Path,
    licences: Mapping[str, bytes],
    cast: tuple[str, str] | None = None,
) -> dict[str, bytes]:
    """Names and contents of all small files of the HF layout.

    quantization: how the weights are quantized, or None.
    dtype: that of the weights, as safetensors names it: BF16.
    cast: the dtypes of the source's weights and of these, where they differ.
    model_type: `mistral` for stock transformers and engines that do not know us.
    source: the folder with tokenizer.model.v3.
    licences: see `model_card.licence_files`.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `tokenizer_files`.
    """
    tokenizer = tokenizer_files(source, vocab_size=geometry.vocab_size)
    return {
        **tokenizer,
        **OWN_FILES[model_type],
        **licences,
        MODEL_CARD_NAME: model_card(licences, model_type=model_type, cast=cast, quantization=quantization).encode(),
        CHAT_TEMPLATE_NAME: CHAT_TEMPLATES[model_type].encode(),
        TOKENIZER_CONFIG_NAME: retag_tokenizer_config(
            tokenizer[TOKENIZER_CONFIG_NAME], model_type, prompt_format=PROMPT_FORMAT
        ),
        CONFIG_NAME: retag_config(json_bytes(config_settings(geometry, quantization, dtype=dtype)), model_type),
        GENERATION_CONFIG_NAME: json_bytes(SPECIAL_IDS),
    }


def config_settings(geometry: Geometry, quantization: Quantization | None, *, dtype: str) -> dict[str, Any]:
    """Return what config.json says of a model, as the library's config class writes it.

    dtype: that of the weights, as safetensors names it.
    """
    sizes = asdict(geometry)
    settings = {
        **FIXED_SETTINGS,
        **SPECIAL_IDS,
        **{name: value for name, value in sizes.items() if name != ROPE_THETA},
        "dtype": TORCH_NAMES[dtype],
        "rope_parameters": {"rope_type": "default", "rope_theta": geometry.rope_theta},
        # Readers tell by it which version's meaning of the settings they have before them.
        "transformers_version": version("transformers"),
    }
    if quantization is not None:
        settings["quantization_config"] = quantization_config(*quantization)
    return settings


def consolidated_files(
    geometry: Geometry,
    *,
    source: Path | None,
    licences: Mapping[str, bytes],
    cast: tuple[str, str] | None = None,
) -> dict[str, bytes]:
    """Names and contents of all small files of the consolidated layout; without `source`, there is no tokenizer.

    The arguments are those of `hf_files`.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `tokenizer_files`.
    """
    files = {
        **licences,
        MODEL_CARD_NAME: model_card(licences, model_type=None, cast=cast).encode(),
        PARAMS_NAME: json_bytes(params_from_geometry(geometry)),
    }
    if source is not None:
        # Proven as on the way there; what is made of it is not wanted here.
        tokenizer_files(source, vocab_size=geometry.vocab_size)
        files[TOKENIZER_NAME] = (find_vocabulary(source) or source / TOKENIZER_NAME).read_bytes()
    return files


def retag_config(content: bytes, model_type: ModelType) -> bytes:
    """A config.json for another model type; all else in it stays."""
    settings: dict[str, Any] = json.loads(content)
    settings |= {"architectures": [ARCHITECTURES[model_type]], "model_type": model_type}
    # Older files have it outside of rope_parameters only. So do older readers look for it, and take 10000 without it.
    rope = settings.get("rope_parameters") or {}
    if model_type == "mistral":
        # Left out, the window would be 4096 there.
        settings |= {**{name: rope[name] for name in rope if name == "rope_theta"}, "sliding_window": None}
        for name in IN_CONFIG:
            settings.pop(name, None)
    else:
        settings |= IN_CONFIG
        for name in ("sliding_window", *(name for name in rope if name == "rope_theta")):
            settings.pop(name, None)
    return json_bytes(settings, sort_keys=True)


def retag_tokenizer_config(content: bytes, model_type: ModelType, *, prompt_format: str | None) -> bytes:
    """A tokenizer_config.json for another model type; all else in it stays.

    prompt_format: of the chat template beside it; None for one that is not ours.
    """
    settings: dict[str, Any] = json.loads(content)
    settings["prompt_format"] = prompt_format
    settings["tokenizer_class"] = TOKENIZER_CLASSES[model_type]
    settings.pop("auto_map", None)
    if model_type == "mistral":
        settings |= STOCK_TOKENIZER_SETTINGS
    else:
        settings = {
            name: value
            for name, value in settings.items()
            if name not in STOCK_TOKENIZER_SETTINGS or value != STOCK_TOKENIZER_SETTINGS[name]
        } | {"auto_map": TOKENIZER_AUTO_MAP}
    return json_bytes(settings, sort_keys=True)
