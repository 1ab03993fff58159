"""The small files next to the weights, in either layout."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mistral_large_conversion.chat_templates import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, PROMPT_FORMAT, prompt_format_of
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
from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object, shown
from mistral_large_conversion.errors import CheckpointError
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
    kept_from: Path | None = None,
) -> dict[str, bytes]:
    """Names and contents of all small files of the HF layout.

    quantization: how the weights are quantized, or None.
    dtype: that of the weights, as safetensors names it: BF16.
    cast: the dtypes of the source's weights and of these, where they differ.
    model_type: `mistral` for stock transformers and engines that do not know us.
    source: the folder with tokenizer.model.v3.
    kept_from: a folder of the HF layout whose own settings stay, see `kept_settings`.
    licences: see `model_card.licence_files`.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `tokenizer_files`.
    """
    ids, generation_config, template = ({}, {}, None) if kept_from is None else kept_settings(kept_from)
    ids = {**SPECIAL_IDS, **ids}
    tokenizer = tokenizer_files(source, vocab_size=geometry.vocab_size)
    return {
        **tokenizer,
        **OWN_FILES[model_type],
        **licences,
        MODEL_CARD_NAME: model_card(licences, model_type=model_type, cast=cast, quantization=quantization).encode(),
        CHAT_TEMPLATE_NAME: (template or CHAT_TEMPLATES[model_type]).encode(),
        TOKENIZER_CONFIG_NAME: retag_tokenizer_config(
            tokenizer[TOKENIZER_CONFIG_NAME], model_type, prompt_format=None if template else PROMPT_FORMAT
        ),
        CONFIG_NAME: retag_config(
            json_bytes(config_settings(geometry, quantization, dtype=dtype, ids=ids)), model_type
        ),
        GENERATION_CONFIG_NAME: json_bytes({**generation_config, **ids}),
    }


def config_settings(
    geometry: Geometry, quantization: Quantization | None, *, dtype: str, ids: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what config.json says of a model, as the library's config class writes it.

    dtype: that of the weights, as safetensors names it.
    ids: the special ids, under their names in config.json.
    """
    sizes = asdict(geometry)
    settings = {
        **FIXED_SETTINGS,
        **ids,
        **{name: value for name, value in sizes.items() if name != ROPE_THETA},
        "dtype": TORCH_NAMES[dtype],
        "rope_parameters": {"rope_type": "default", "rope_theta": geometry.rope_theta},
        # Readers tell by it which version's meaning of the settings they have before them.
        "transformers_version": version("transformers"),
    }
    if quantization is not None:
        settings["quantization_config"] = quantization_config(*quantization)
    return settings


def kept_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """The settings of a folder of the HF layout that stay when its weights are quantized.

    Returns: the special ids that generation takes, all of generation_config.json, and a chat template that is not ours.

    Raises:
        CheckpointError: a file that cannot be read, or ids that are none.
    """
    settings: dict[str, dict[str, Any]] = {}
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME):
        if not (folder / name).exists():
            continue
        if problem := file_problem(folder, name):
            raise CheckpointError(f"{folder}: {problem}")
        try:
            settings[name] = read_json_object(folder / name)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / name}: {error}") from error
    ids: dict[str, Any] = {}
    for name, content in settings.items():
        for key in SPECIAL_IDS:
            # For transformers, null is the same as a file without it.
            if (value := content.get(key)) is None:
                continue
            if not all(type(each) is int and each >= 0 for each in (value if isinstance(value, list) else [value])):
                raise CheckpointError(f"{folder / name}: {key} is {shown(value)}: must be an id or a list of ids")
            ids[key] = value
    template = None
    if (folder / CHAT_TEMPLATE_NAME).exists():
        if problem := file_problem(folder, CHAT_TEMPLATE_NAME):
            raise CheckpointError(f"{folder}: {problem}")
        template = (folder / CHAT_TEMPLATE_NAME).read_bytes().decode("utf-8", errors="replace")
    return ids, settings.get(GENERATION_CONFIG_NAME, {}), template if prompt_format_of(template) is None else None


def refuse_other_ids(where: object, ids: Mapping[str, Any]) -> None:
    """Refuse special ids that are lost in the consolidated layout, for which every reader takes those of the tokenizer.

    Raises:
        CheckpointError: what they are and what they would become.
    """
    for name in ("bos_token_id", "eos_token_id"):
        own, found = SPECIAL_IDS[name], ids.get(name)
        if found not in (None, own, [own]):
            raise CheckpointError(
                f"{where}: {name} is {shown(found)}, and the consolidated layout has no place for it: every reader "
                f"takes {own}; set it to {own} in {CONFIG_NAME} and {GENERATION_CONFIG_NAME} if that is right"
            )


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

    prompt_format: of the chat template next to it; None for one that is not ours.
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
