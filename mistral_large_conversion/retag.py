"""Another model type for a folder of the HF layout: the small files that say it, never the weights."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mistral_large_conversion.chat_templates import prompt_format_of
from mistral_large_conversion.checkpoint.atomic_write import json_bytes, write_file
from mistral_large_conversion.checkpoint.layout import (
    CHAT_TEMPLATE_NAME,
    CONFIG_NAME,
    MODEL_CARD_NAME,
    TOKENIZER_CONFIG_NAME,
)
from mistral_large_conversion.checkpoint.read import load_headers
from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object
from mistral_large_conversion.destination import UNFINISHED_NAME
from mistral_large_conversion.errors import CheckpointError, DestinationError
from mistral_large_conversion.folder_checks import has_model_file
from mistral_large_conversion.hf_files import (
    ARCHITECTURES,
    OWN_FILES,
    TEMPLATES,
    retag_config,
    retag_tokenizer_config,
)
from mistral_large_conversion.manifest import MANIFEST_NAME, ManifestFile, read_manifest
from mistral_large_conversion.model_card import ModelType, retag_model_card
from mistral_large_conversion.options import check_option
from mistral_large_conversion.tokenizer import tokenizer_problems


def retag_checkpoint(folder: Path | str, model_type: ModelType) -> list[str]:
    """Make a folder of the HF layout say `model_type`, and return the names of the files that were changed.

    Settings that someone else has added stay, and so does a chat template or a model card that is not ours. After an
    interruption the folder loads as one of the two, and the same call ends the work.

    Raises:
        CheckpointError: a folder that is not a sound, finished conversion of ours.
        DestinationError: a file that cannot be written.
    """
    check_option("model_type", model_type, ARCHITECTURES)
    folder = Path(folder)
    vocab_size = load_headers(folder, "hf").geometry.vocab_size
    if (folder / UNFINISHED_NAME).exists():
        raise CheckpointError(f"{folder}: an unfinished conversion; run `mistral-large convert` again first")
    names = (CHAT_TEMPLATE_NAME, MODEL_CARD_NAME, TOKENIZER_CONFIG_NAME, CONFIG_NAME)
    problems = [problem for name in names if (problem := file_problem(folder, name))]
    problems += [f"{name} is a link: its target would not change" for name in names if (folder / name).is_symlink()]
    problems += _settings_problems(folder) or tokenizer_problems(
        folder, vocab_size=vocab_size, may_lack_model=not has_model_file(folder)
    )
    if problems:
        raise CheckpointError(
            f"{folder}: cannot be retagged, it is not as it was converted: {'; '.join(problems)}; convert it again"
        )
    retagged = _retagged(folder, model_type)
    removed = [name for files in OWN_FILES.values() for name in files if name not in retagged]
    # Before the files that it is of: until they are written, they do not pass.
    contents = {**_retagged_manifest(folder, model_type, removed), **retagged}
    changed = {name: content for name, content in contents.items() if not _is(folder / name, content)}
    removed = [name for name in removed if os.path.lexists(folder / name)]
    try:
        for name, content in changed.items():
            write_file(folder / name, content)
        for name in removed:
            (folder / name).unlink()
    except OSError as error:
        raise DestinationError(f"{folder}: not retagged: {error}; when that is fixed, run it again") from error
    return [*changed, *removed]


def _settings_problems(folder: Path) -> list[str]:
    try:
        read_json_object(folder / TOKENIZER_CONFIG_NAME)
    except (OSError, ValueError) as error:
        return [f"{TOKENIZER_CONFIG_NAME}: {error}"]
    return []


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _retagged(folder: Path, model_type: ModelType) -> dict[str, bytes]:
    """The contents of the files that say the model type; last of the file that says how the others are read."""
    present = {name: (folder / name).read_bytes() for name in (CHAT_TEMPLATE_NAME, MODEL_CARD_NAME)}
    template = present[CHAT_TEMPLATE_NAME]
    prompt_format = prompt_format_of(template.decode("utf-8", errors="replace"))
    if prompt_format is not None:
        template = TEMPLATES[model_type][prompt_format].encode()
    return {
        **OWN_FILES[model_type],
        CHAT_TEMPLATE_NAME: template,
        MODEL_CARD_NAME: retag_model_card(present[MODEL_CARD_NAME], model_type),
        TOKENIZER_CONFIG_NAME: retag_tokenizer_config(
            (folder / TOKENIZER_CONFIG_NAME).read_bytes(), model_type, prompt_format=prompt_format
        ),
        CONFIG_NAME: retag_config((folder / CONFIG_NAME).read_bytes(), model_type),
    }


def _retagged_manifest(folder: Path, model_type: ModelType, removed: Sequence[str]) -> dict[str, bytes]:
    """The manifest of the retagged folder; a file that was changed by someone else stays one that has changed."""
    manifest = read_manifest(folder)
    if manifest is None or manifest.files is None:
        return {}
    files = {name: entry for name, entry in manifest.files.items() if name not in removed}
    files |= {name: ManifestFile.of(content) for name, content in OWN_FILES[model_type].items()}
    versions = [_retagged(folder, each) for each in TEMPLATES]
    for name, content in _retagged(folder, model_type).items():
        # The entry may be that of either model type, if an earlier call was interrupted.
        if files.get(name) in [ManifestFile.of(version[name]) for version in versions if name in version]:
            files[name] = ManifestFile.of(content)
    return {MANIFEST_NAME: json_bytes(replace(manifest, files=dict(sorted(files.items()))).to_json())}
