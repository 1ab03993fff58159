"""The tokenizer of a converted checkpoint, written and proven to have SentencePiece's ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from mistral_large_conversion.chat_templates import RESPONSE_TEMPLATE
from mistral_large_conversion.checkpoint.atomic_write import json_bytes
from mistral_large_conversion.checkpoint.layout import TOKENIZER_CONFIG_NAME, TOKENIZER_JSON_NAME, TOKENIZER_NAME
from mistral_large_conversion.errors import CheckpointError, TokenizerFileError
from mistral_large_conversion.sentencepiece_bpe import (
    TextEncoder,
    load_processor,
    load_sentencepiece_bpe,
    read_tokenizer_json,
)
from mistral_large_conversion.vocabulary import BOS, EOS, MAX_LENGTH, PAD, UNKNOWN, find_vocabulary

# What tokenizer_config.json says, as the library's tokenizer class writes it.
TOKENIZER_SETTINGS: dict[str, Any] = {
    "backend": "tokenizers",
    "bos_token": BOS,
    "eos_token": EOS,
    "model_max_length": MAX_LENGTH,
    "pad_token": PAD,
    "response_template": RESPONSE_TEMPLATE,
    "unk_token": UNKNOWN,
}
# The parts of tokenizer.json that decide about ids and text. The others, `truncation` and `padding`, are set anew by
# each call of transformers.
MAKES_IDS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")

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


def tokenizer_files(source: Path, *, vocab_size: int) -> dict[str, bytes]:
    """Names and contents of the tokenizer files for a checkpoint from `source`.

    Raises:
        CheckpointError: the tokenizer has another number of pieces than the weights have rows, or its conversion is
            not exact.
        TokenizerFileError: the file is not a v3 tokenizer.
    """
    # Of this file alone: the vendor's folder also has a tokenizer.json and a template, which are not exact.
    vocabulary = find_vocabulary(source) or source / TOKENIZER_NAME
    files = {
        TOKENIZER_NAME: vocabulary.read_bytes(),
        TOKENIZER_JSON_NAME: load_sentencepiece_bpe(vocabulary).to_str(pretty=True).encode(),
        TOKENIZER_CONFIG_NAME: json_bytes(TOKENIZER_SETTINGS),
    }
    processor = load_processor(vocabulary)
    if processor.vocab_size() != vocab_size:
        raise CheckpointError(
            f"{vocabulary}: has {processor.vocab_size()} pieces, the weights have {vocab_size} rows; "
            "take both from one checkpoint"
        )
    # What was written, read again.
    written = Tokenizer.from_buffer(files[TOKENIZER_JSON_NAME])
    if (text := inexact_text(TextEncoder(written), processor)) is not None:
        raise CheckpointError(f"{vocabulary}: converted ids of {text[:40]!r} are not SentencePiece's")
    return files


def tokenizer_problems(folder: Path, *, vocab_size: int) -> list[str]:
    """What is wrong with tokenizer.json, compared whole with what is made of the tokenizer.model.v3 next to it.

    Tokens may have been added since, if the weights have rows for them. Empty if nothing is wrong.
    """
    try:
        wanted = json.loads(load_sentencepiece_bpe(folder / TOKENIZER_NAME).to_str())
        found = json.loads(read_tokenizer_json(folder / TOKENIZER_JSON_NAME).to_str())
    except TokenizerFileError as error:
        return [str(error)]
    pieces, added = len(wanted["model"]["vocab"]), found["added_tokens"][len(wanted["added_tokens"]) :]
    found["added_tokens"] = found["added_tokens"][: len(wanted["added_tokens"])]
    problems = []
    if vocab_size < pieces + len(added) or (vocab_size > pieces and not added):
        problems.append(f"{TOKENIZER_JSON_NAME} has {pieces + len(added)} tokens, the weights have {vocab_size} rows")
    differing = [name for name in MAKES_IDS if found[name] != wanted[name]]
    if differing:
        problems.append(f"{TOKENIZER_JSON_NAME}: {', '.join(differing)} not as made from {TOKENIZER_NAME}")
    return problems


def inexact_text(encode: Callable[[str], list[int]], processor: SentencePieceProcessor) -> str | None:
    """The first text of the corpus whose ids are not SentencePiece's, or None."""
    exact = processor.encode(list(CORPUS))
    return next((text for text, ids in zip(CORPUS, exact, strict=True) if encode(text) != ids), None)
