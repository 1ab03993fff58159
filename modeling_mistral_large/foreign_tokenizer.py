"""The tokenizer of a folder whose files another program wrote: the exact one, where the vocabulary is the vendor's."""

import warnings
from pathlib import Path
from typing import Any

from mistral_large_conversion.chat_templates import CHAT_TEMPLATES, RESPONSE_TEMPLATES, prompt_format_of
from mistral_large_conversion.checkpoint.layout import TOKENIZER_JSON_NAME
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, read_folder_tokenizer
from mistral_large_conversion.vocabulary import BOS, EOS, PAD, UNKNOWN, VOCABULARIES

SPECIAL_TOKENS = {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, "pad_token": PAD}


def read_foreign_tokenizer(folder: Path, name: object) -> dict[str, Any] | None:
    """Return arguments of a tokenizer's `__init__` from the files of a folder, or None if the vocabulary is unknown.

    name: what to call the folder.

    The backend is made of the pieces, and tokens that were added keep their ids. A chat template that renders v3 or v7
    is replaced by the bundled one, whose prompts are the reference's; any other stays. One warning says what was not
    exact in the folder's own files.

    Raises:
        TokenizerFileError: a file that cannot be read.
    """
    found = read_folder_tokenizer(folder, layout="hf")
    if found.vocabulary is None:
        return None
    arguments: dict[str, Any] = {
        "read_backend": found.backend,
        "vocab_file": None if found.model_file is None else str(folder / found.model_file),
        **SPECIAL_TOKENS,
        **found.special_tokens,
    }
    if found.prompt_format is not None:
        arguments["chat_template"] = CHAT_TEMPLATES[found.prompt_format]
        arguments["response_template"] = RESPONSE_TEMPLATES[found.prompt_format]
    if said := _inexact(found):
        warnings.warn(f"{name}: {'; '.join(said)}", stacklevel=2)
    return arguments


def _inexact(found: FolderTokenizer) -> list[str]:
    """What was not exact in the files of a folder, and what was done."""
    said = []
    if found.source == TOKENIZER_JSON_NAME:
        added = f" and the {len(found.added)} tokens added to them" if found.added else ""
        said.append(
            f"{found.source} is another program's conversion of the {found.vocabulary} vocabulary, whose ids are not "
            f"those of {VOCABULARIES[str(found.vocabulary)].file_name} for every text; the tokenizer is made anew of "
            f"its pieces{added}"
        )
    template = found.chat_templates.get("default")
    if found.prompt_format is not None and template is not None and prompt_format_of(template) is None:
        said.append(
            f"prompts are {found.prompt_format}'s, exactly, instead of what its chat template renders "
            f"({found.format_reason}); pass chat_template= for another one"
        )
    return [*said, *found.remarks]
