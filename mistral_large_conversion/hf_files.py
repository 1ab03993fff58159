"""The small files next to the weights, in either layout."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mistral_large_conversion.chat_templates import CHAT_TEMPLATES, PLAIN_CHAT_TEMPLATES
from mistral_large_conversion.checkpoint.adapter import Adapter
from mistral_large_conversion.checkpoint.atomic_write import json_bytes
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.layout import (
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    MODEL_CARD_NAME,
    TOKENIZER_CONFIG_NAME,
)
from mistral_large_conversion.checkpoint.params import PARAMS_NAME, ROPE_THETA, params_from_geometry
from mistral_large_conversion.checkpoint.quantization import Quantization, quantization_config
from mistral_large_conversion.checkpoint.remote_code import IN_CONFIG, REMOTE_CODE, REMOTE_CODE_NAME, TOKENIZER_AUTO_MAP
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES
from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object, shown
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, read_folder_tokenizer
from mistral_large_conversion.model_card import (
    ModelType,
    SourceCard,
    is_vendors,
    licence_files,
    model_card,
    source_card,
)
from mistral_large_conversion.tokenizer import tokenizer_files
from mistral_large_conversion.vocabulary import (
    SPECIAL_IDS,
    VOCAB_SIZE,
    VOCABULARIES,
    VOCABULARY_NAMES,
    find_vocabulary,
    known_vocabulary,
)

ARCHITECTURES: dict[ModelType, str] = {"mistral_large": "MistralLargeForCausalLM", "mistral": "MistralForCausalLM"}
TOKENIZER_CLASSES: dict[ModelType, str] = {
    "mistral_large": "MistralLargeTokenizer",
    # Every transformers has a class of this name that takes tokenizer.json unchanged.
    "mistral": "PreTrainedTokenizerFast",
}
# By prompt format. The tag `generation` is transformers' own: the template engines of other programs do not know it.
TEMPLATES: dict[ModelType, dict[str, str]] = {"mistral_large": CHAT_TEMPLATES, "mistral": PLAIN_CHAT_TEMPLATES}


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
    keeps_settings: bool = False,
    cast: tuple[str, str] | None = None,
    adapter: Adapter | None = None,
    calibration: Calibration | None = None,
    tokenizer: FolderTokenizer | None = None,
) -> dict[str, bytes]:
    """Names and contents of all small files of the HF layout.

    quantization: how the weights are quantized, or None.
    dtype: that of the weights, as safetensors names it: BF16.
    cast: the dtypes of the source's weights and of these, where they differ.
    model_type: `mistral` for stock transformers and engines that do not know us.
    source: the folder with the tokenizer and the licence files, see `model_card.licence_files`.
    keeps_settings: whether the source is of the HF layout and its own settings stay, see `kept_settings`.
    tokenizer: that of the source; without it, it is read from there.
    adapter: the LoRA that is merged into the weights, or None.
    calibration: what quantized weights are calibrated with, or None.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `tokenizer_files`.
    """
    licences = licence_files(source)
    ids, generation_config = kept_settings(source) if keeps_settings else ({}, {})
    ids = {**SPECIAL_IDS, **ids}
    if keeps_settings:
        tokenizer = tokenizer or read_folder_tokenizer(source, layout="hf")
        files = tokenizer_files(source, vocab_size=geometry.vocab_size, tokenizer=tokenizer)
        vocabulary, prompt_format, templates = tokenizer.vocabulary, tokenizer.prompt_format, tokenizer.chat_templates
    else:
        files = tokenizer_files(source, vocab_size=geometry.vocab_size)
        vocabulary = next(name for name, each in VOCABULARIES.items() if each.file_name in files)
        prompt_format, templates = vocabulary, {}
    carried = source_card(source)
    is_model = is_vendors(source) or (not keeps_settings and carried == SourceCard())
    card = model_card(
        licences,
        model_type=model_type,
        cast=cast,
        quantization=quantization,
        adapter=adapter,
        calibration=calibration,
        model=vocabulary if is_model else None,
        source=carried,
    )
    return {
        **files,
        **OWN_FILES[model_type],
        **licences,
        MODEL_CARD_NAME: card.encode(errors="surrogateescape"),
        **(template_files(files, model_type, prompt_format, templates) if vocabulary is not None else {}),
        CONFIG_NAME: retag_config(
            json_bytes(config_settings(geometry, quantization, dtype=dtype, ids=ids)), model_type
        ),
        GENERATION_CONFIG_NAME: json_bytes({**generation_config, **ids}),
    }


def template_files(
    files: Mapping[str, bytes], model_type: ModelType, prompt_format: str | None, templates: Mapping[str, str]
) -> dict[str, bytes]:
    """The chat template of a known vocabulary, and the tokenizer_config.json that names its prompt format.

    files: those of `tokenizer_files`.
    templates: of the checkpoint itself, by name, for a prompt format of its own.
    """
    if prompt_format is not None:
        template = {CHAT_TEMPLATE_NAME: TEMPLATES[model_type][prompt_format].encode()}
    else:
        # Several have their place in tokenizer_config.json.
        template = {CHAT_TEMPLATE_NAME: templates["default"].encode()} if [*templates] == ["default"] else {}
    config = retag_tokenizer_config(files[TOKENIZER_CONFIG_NAME], model_type, prompt_format=prompt_format)
    return {**template, TOKENIZER_CONFIG_NAME: config}


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


def kept_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a folder of the HF layout that stay when its weights are written anew.

    Returns: the special ids that generation takes, and all of generation_config.json.

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
    return ids, settings.get(GENERATION_CONFIG_NAME, {})


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
    source: Path,
    cast: tuple[str, str] | None = None,
    adapter: Adapter | None = None,
    tokenizer: FolderTokenizer | None = None,
) -> dict[str, bytes]:
    """Names and contents of all small files of the consolidated layout.

    The arguments are those of `hf_files`.

    Raises:
        CheckpointError, TokenizerFileError: the reasons of `tokenizer_files`.
    """
    licences, model = licence_files(source), None
    if is_vendors(source):
        model = tokenizer.vocabulary if tokenizer is not None else known_vocabulary(find_vocabulary(source) or source)
    card = model_card(licences, model_type=None, cast=cast, adapter=adapter, model=model, source=source_card(source))
    # Proven as on the way there; of what is made of it, the SentencePiece file is wanted here.
    made = tokenizer_files(source, vocab_size=geometry.vocab_size, tokenizer=tokenizer)
    return {
        **licences,
        MODEL_CARD_NAME: card.encode(errors="surrogateescape"),
        PARAMS_NAME: json_bytes(params_from_geometry(geometry)),
        **{name: content for name, content in made.items() if name in VOCABULARY_NAMES},
    }


def refuse_outside_layout(tokenizer: FolderTokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer of which the consolidated layout has no place for a part.

    Raises:
        CheckpointError: another vocabulary, added tokens and their rows, or a prompt format of its own.
    """
    folder, added = tokenizer.folder, [token.content for token in tokenizer.added]
    if tokenizer.vocabulary is None:
        raise CheckpointError(
            f"{folder}: {tokenizer.remarks[0]}; the consolidated layout takes the v3 and v7 vocabularies only; use the "
            "HF layout"
        )
    if vocab_size > VOCAB_SIZE or added:
        names = f", {shown(added)}" if added else ""
        raise CheckpointError(
            f"{folder}: the weights have {vocab_size} rows, {VOCABULARIES[tokenizer.vocabulary].file_name} has "
            f"{VOCAB_SIZE} pieces: {vocab_size - VOCAB_SIZE} were added{names}, and the consolidated layout has no "
            "place for added tokens; use the HF layout, or remove them and their rows first"
        )
    if tokenizer.prompt_format != tokenizer.vocabulary:
        raise CheckpointError(
            f"{folder}: its prompts are {tokenizer.prompt_format or 'those of its own chat template'}, as "
            f"{tokenizer.format_reason}, and readers of the consolidated layout take {tokenizer.vocabulary} for this "
            f"vocabulary; use the HF layout, or pass prompt_format {tokenizer.vocabulary!r} if that is right"
        )


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
