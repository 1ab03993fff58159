"""Another model type for a folder of the HF layout: the small files that say it, never the weights."""

from pathlib import Path

from modeling_mistral_large.chat_templates import prompt_format_of
from modeling_mistral_large.conversion.destination import UNFINISHED_NAME, whole_file
from modeling_mistral_large.conversion.hf_files import (
    CHAT_TEMPLATE_NAME,
    CHAT_TEMPLATES,
    CONFIG_NAME,
    MODEL_CARD_NAME,
    retag_config,
    retag_tokenizer_config,
)
from modeling_mistral_large.conversion.inspect import load_headers
from modeling_mistral_large.conversion.model_card import ModelType, retag_model_card
from modeling_mistral_large.conversion.source_files import file_finding, read_json_object
from modeling_mistral_large.conversion.tokenizer import TOKENIZER_CONFIG_NAME, tokenizer_findings
from modeling_mistral_large.errors import CheckpointError, DestinationError


def retag_checkpoint(folder: Path | str, model_type: ModelType) -> list[str]:
    """Make a folder of the HF layout say `model_type`, and return the names of the files that were changed.

    Settings that someone else has added stay, and so does a chat template or a model card that is not ours. After an
    interruption the folder loads as one of the two, and the same call ends the work.

    Raises:
        CheckpointError: a folder that is not a sound, finished conversion of ours.
        DestinationError: a file that cannot be written.
    """
    folder = Path(folder)
    config = load_headers(folder, "hf").config
    if (folder / UNFINISHED_NAME).exists():
        raise CheckpointError(f"{folder}: an unfinished conversion; run `mistral-large convert` again first")
    names = (CHAT_TEMPLATE_NAME, MODEL_CARD_NAME, TOKENIZER_CONFIG_NAME, CONFIG_NAME)
    findings = [finding for name in names if (finding := file_finding(folder, name))]
    findings += [f"{name} is a link: its target would not change" for name in names if (folder / name).is_symlink()]
    findings += _settings_findings(folder) or tokenizer_findings(folder, vocab_size=config.vocab_size)
    if findings:
        raise CheckpointError(f"{folder}: cannot be retagged, it is not as it was converted: {'; '.join(findings)}")
    changed = _retagged(folder, model_type)
    try:
        for name, content in changed.items():
            with whole_file(folder / name) as out:
                out.write(content)
    except OSError as error:
        raise DestinationError(f"{folder}: not retagged: {error}; when that is mended, run it again") from error
    return list(changed)


def _settings_findings(folder: Path) -> list[str]:
    try:
        read_json_object(folder / TOKENIZER_CONFIG_NAME)
    except (OSError, ValueError) as error:
        return [f"{TOKENIZER_CONFIG_NAME}: {error}"]
    return []


def _retagged(folder: Path, model_type: ModelType) -> dict[str, bytes]:
    """The new contents of the files that change; last of the file that says how the others are read."""
    present = {name: (folder / name).read_bytes() for name in (CHAT_TEMPLATE_NAME, MODEL_CARD_NAME)}
    template = present[CHAT_TEMPLATE_NAME]
    prompt_format = prompt_format_of(template.decode("utf-8", errors="replace"))
    if prompt_format is not None:
        template = CHAT_TEMPLATES[model_type].encode()
    retagged = {
        CHAT_TEMPLATE_NAME: template,
        MODEL_CARD_NAME: retag_model_card(present[MODEL_CARD_NAME], model_type),
        TOKENIZER_CONFIG_NAME: retag_tokenizer_config(
            (folder / TOKENIZER_CONFIG_NAME).read_bytes(), model_type, prompt_format=prompt_format
        ),
        CONFIG_NAME: retag_config((folder / CONFIG_NAME).read_bytes(), model_type),
    }
    return {name: content for name, content in retagged.items() if (folder / name).read_bytes() != content}
