"""The tokenizer of a converted checkpoint, written and proven to have SentencePiece's ids."""

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from mistral_large_conversion.chat_templates import RESPONSE_TEMPLATES
from mistral_large_conversion.checkpoint.atomic_write import json_bytes
from mistral_large_conversion.checkpoint.layout import TOKENIZER_CONFIG_NAME, TOKENIZER_JSON_NAME, TOKENIZER_NAME
from mistral_large_conversion.checkpoint.source_files import file_problem, shown
from mistral_large_conversion.errors import CheckpointError, TokenizerFileError
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, read_folder_tokenizer
from mistral_large_conversion.sentencepiece_bpe import (
    TextEncoder,
    build_backend,
    load_sentencepiece_bpe,
    read_tokenizer_json,
    vocabulary_of,
)
from mistral_large_conversion.vocabulary import (
    BOS,
    EOS,
    KNOWN_FILES,
    MAX_LENGTH,
    PAD,
    UNKNOWN,
    VOCAB_SIZE,
    VOCABULARIES,
    find_vocabulary,
)

# What tokenizer_config.json says, as the library's tokenizer class writes it.
TOKENIZER_SETTINGS: dict[str, Any] = {
    "backend": "tokenizers",
    "bos_token": BOS,
    "eos_token": EOS,
    "model_max_length": MAX_LENGTH,
    "pad_token": PAD,
    "unk_token": UNKNOWN,
}
# The parts of tokenizer.json that decide about ids and text. The others, `truncation` and `padding`, are set anew by
# each call of transformers.
MAKES_IDS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")

# sha256 of the tokenizer.json made from each of the vendor's files; a test makes them again. With both known, nothing
# has to be rebuilt to compare them, which takes longer than all other checks of a small checkpoint.
MADE_FROM_VENDOR = {
    "v3": "dea1f79a85d81298e7a2db9bab3bb0ef5f9627f46f94e462bca66f07552c46c8",
    "v7": "547b8af3322d6d1c80d09346165ca765f9e57631c40a96f6ac8bda58ab886ea5",
}

# One line for each way in which a conversion has been seen to go wrong.
CORPUS = (
    "",
    " ",
    "Hello, how are you?",
    " leading and trailing ",
    "▁already begins with the mark",
    "a  b   c    d" + " " * 17 + "e",
    "def f(x):\n\tif x:\n        return {'a': 1}\n",
    "\r\n\r\n\t\t  \n",
    "[INST] literal control strings </s><s>[/INST][TOOL_CALLS]",
    "[REFERENCE_DOC_0] user-defined pieces [REFERENCE_DOC_19]",
    "<0x41><unk>[control_12]",
    "Déjà vu, façade, e\u0301, Ünïcödé, œuvre",
    "你好，世界。こんにちは 안녕하세요 Привет مرحبا שלום",
    "👩‍👩‍👧‍👦🏴󠁧󠁢󠁳󠁣󠁴󠁿 \U0001f680\u200d\ufe0f",
    "1234567890 3.14159 1e-5 0x7fffffff",
    '{"name": "get_weather", "arguments": {"city": "Paris"}}',
    "\u0000\u0001\u007f\u00a0\u2028\ufeff\ufffd\U0010ffff",
    "a" * 300 + " " * 300,
)


def tokenizer_files(source: Path, *, vocab_size: int, tokenizer: FolderTokenizer | None = None) -> dict[str, bytes]:
    """Names and contents of the tokenizer files for a checkpoint from `source`.

    tokenizer: of a folder of the HF layout; without it, the SentencePiece file of the folder alone is read, and must
        have as many pieces as the weights have rows.

    Raises:
        CheckpointError: more tokens than the weights have rows, or a conversion that is not exact.
        TokenizerFileError: the file is not a v3 or v7 tokenizer.
    """
    if tokenizer is not None:
        return _files_of(tokenizer, vocab_size=vocab_size)
    # Of this file alone: the vendor's folder also has a tokenizer.json and a template, which are not exact.
    path = find_vocabulary(source) or source / TOKENIZER_NAME
    backend = load_sentencepiece_bpe(path)
    if vocab_size != VOCAB_SIZE:
        raise CheckpointError(
            f"{path}: has {VOCAB_SIZE} pieces, the weights have {vocab_size} rows; take both from one checkpoint"
        )
    name = vocabulary_of(backend).name
    return _proven(path, path.read_bytes(), backend, tokenizer_settings(name), name)


def tokenizer_settings(prompt_format: str | None) -> dict[str, Any]:
    """What tokenizer_config.json says for a prompt format, or for a template of its own."""
    response_template = RESPONSE_TEMPLATES.get(prompt_format or "")
    return TOKENIZER_SETTINGS | ({} if response_template is None else {"response_template": response_template})


def _files_of(tokenizer: FolderTokenizer, *, vocab_size: int) -> dict[str, bytes]:
    if tokenizer.vocabulary is None:
        return tokenizer.carried_files()
    tokens = VOCAB_SIZE + len(tokenizer.added)
    if tokens > vocab_size:
        names = f", {shown([token.content for token in tokenizer.added])} added" if tokenizer.added else ""
        raise CheckpointError(
            f"{tokenizer.folder}: its tokenizer has {tokens} tokens{names}, the weights have {vocab_size} rows: every "
            "token needs one; take both from one checkpoint"
        )
    settings = {**tokenizer_settings(tokenizer.prompt_format), **tokenizer.special_tokens}
    if [*tokenizer.chat_templates] not in ([], ["default"]) and tokenizer.prompt_format is None:
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in tokenizer.chat_templates.items()
        ]
    where = tokenizer.folder / tokenizer.source
    return _proven(where, tokenizer.sentencepiece, tokenizer.backend, settings, tokenizer.vocabulary)


def _proven(
    where: Path, model: bytes, backend: Tokenizer, settings: dict[str, Any], vocabulary: str
) -> dict[str, bytes]:
    """The tokenizer files of a vocabulary, compared with SentencePiece: as read again, unless the file is a known one.

    Raises:
        CheckpointError: the ids of some text are not SentencePiece's.
    """
    content = backend.to_str(pretty=True).encode()
    # What is made from the vendor's files is read again by the tests. That takes a tenth of a second, and the memory of
    # a second backend.
    if sha256(content).hexdigest() != MADE_FROM_VENDOR[vocabulary]:
        backend = Tokenizer.from_buffer(content)
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    if (text := inexact_text(TextEncoder(backend), processor)) is not None:
        raise CheckpointError(f"{where}: converted ids of {text[:40]!r} are not SentencePiece's")
    return {
        VOCABULARIES[vocabulary].file_name: model,
        TOKENIZER_JSON_NAME: content,
        TOKENIZER_CONFIG_NAME: json_bytes(settings),
    }


def tokenizer_problems(folder: Path, *, vocab_size: int, may_lack_model: bool = False) -> list[str]:
    """What is wrong with tokenizer.json, compared whole with what is made of the SentencePiece file next to it.

    Tokens may have been added since, if the weights have rows for them. Empty if nothing is wrong.

    may_lack_model: whether the folder may have no SentencePiece file; then the pieces of tokenizer.json are taken.
    """
    model = find_vocabulary(folder)
    if model is not None and _is_made_from_vendor(model, folder / TOKENIZER_JSON_NAME):
        # Rows without a token are padding.
        if vocab_size >= VOCAB_SIZE:
            return []
        return [f"{TOKENIZER_JSON_NAME} has {VOCAB_SIZE} tokens, the weights have {vocab_size} rows"]
    try:
        if model is None and may_lack_model:
            model = folder / TOKENIZER_JSON_NAME
            tokenizer = read_folder_tokenizer(folder, layout="hf")
            if tokenizer.vocabulary is None:
                return [*tokenizer.remarks]
            made = build_backend(tokenizer.pieces)
        else:
            model = model or folder / TOKENIZER_NAME
            made = load_sentencepiece_bpe(model)
        written = read_tokenizer_json(folder / TOKENIZER_JSON_NAME)
    except TokenizerFileError as error:
        return [str(error)]
    made_json, written_json = made.to_str(), written.to_str()
    if written_json == made_json and vocab_size >= VOCAB_SIZE:
        return []
    wanted, found = json.loads(made_json), json.loads(written_json)
    pieces, added = len(wanted["model"]["vocab"]), found["added_tokens"][len(wanted["added_tokens"]) :]
    found["added_tokens"] = found["added_tokens"][: len(wanted["added_tokens"])]
    problems = []
    # Rows without a token are padding.
    if vocab_size < pieces + len(added):
        problems.append(f"{TOKENIZER_JSON_NAME} has {pieces + len(added)} tokens, the weights have {vocab_size} rows")
    differing = [name for name in MAKES_IDS if found[name] != wanted[name]]
    if differing:
        problems.append(f"{TOKENIZER_JSON_NAME}: {', '.join(differing)} not as made from {model.name}")
    return problems


def _is_made_from_vendor(model: Path, made: Path) -> bool:
    """Whether the vendor's file and the tokenizer.json made from it are both there, byte for byte."""
    # Most of a pipe or of a file without end would never be read.
    if any(file_problem(path.parent, path.name) for path in (model, made)):
        return False
    try:
        of_model, of_made = (sha256(path.read_bytes()).hexdigest() for path in (model, made))
    except OSError:
        return False
    return of_made == MADE_FROM_VENDOR.get(KNOWN_FILES.get(of_model, ""))


def inexact_text(encode: Callable[[str], list[int]], processor: SentencePieceProcessor) -> str | None:
    """The first text of the corpus whose ids are not SentencePiece's, or None."""
    exact = processor.encode(list(CORPUS))
    return next((text for text, ids in zip(CORPUS, exact, strict=True) if encode(text) != ids), None)
