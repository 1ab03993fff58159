"""The tokenizer of a converted checkpoint, written and proven to have SentencePiece's ids."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from sentencepiece import SentencePieceProcessor

from modeling_mistral_large.conversion.destination import json_bytes
from modeling_mistral_large.conversion.plan import TOKENIZER_NAME
from modeling_mistral_large.errors import CheckpointError, DestinationError, TokenizerFileError
from modeling_mistral_large.sentencepiece_bpe import find_vocabulary, load_processor, read_tokenizer_json
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TOKENIZER_JSON_NAME = "tokenizer.json"
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
        DestinationError: the folder for temporary files is full.
    """
    vocabulary = find_vocabulary(source) or source / TOKENIZER_NAME
    with TemporaryDirectory() as name:
        folder = Path(name)
        # Of this file alone: the vendor's folder also has a tokenizer.json and a template, which are not exact.
        tokenizer = MistralLargeTokenizer(vocab_file=str(vocabulary))
        try:
            tokenizer.save_pretrained(folder)
        # The Rust library raises nothing more specific when the disk is full.
        except Exception as error:
            raise DestinationError(
                f"{folder}: the tokenizer cannot be written: {error}; make room there or set TMPDIR"
            ) from error
        tokenizer = MistralLargeTokenizer.from_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    settings = json.loads(files[TOKENIZER_CONFIG_NAME])
    # transformers writes how the tokenizer was read, too.
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    files[TOKENIZER_CONFIG_NAME] = json_bytes(settings)
    processor = load_processor(vocabulary)
    if processor.vocab_size() != vocab_size:
        raise CheckpointError(
            f"{vocabulary}: has {processor.vocab_size()} pieces, the weights have {vocab_size} rows; "
            "take both from one checkpoint"
        )
    if (text := inexact_text(tokenizer, processor)) is not None:
        raise CheckpointError(f"{vocabulary}: converted ids of {text[:40]!r} are not SentencePiece's")
    return files


def tokenizer_findings(folder: Path, *, vocab_size: int) -> list[str]:
    """What is wrong with tokenizer.json, compared whole with what is made of the tokenizer.model.v3 next to it.

    Tokens may have been added since, if the weights have rows for them. Empty if nothing is wrong.
    """
    try:
        wanted = json.loads(MistralLargeTokenizer(vocab_file=str(folder / TOKENIZER_NAME)).backend_tokenizer.to_str())
        found = json.loads(read_tokenizer_json(folder / TOKENIZER_JSON_NAME).to_str())
    except TokenizerFileError as error:
        return [str(error)]
    pieces, added = len(wanted["model"]["vocab"]), found["added_tokens"][len(wanted["added_tokens"]) :]
    found["added_tokens"] = found["added_tokens"][: len(wanted["added_tokens"])]
    findings = []
    if vocab_size < pieces + len(added) or (vocab_size > pieces and not added):
        findings.append(f"{TOKENIZER_JSON_NAME} has {pieces + len(added)} tokens, the weights have {vocab_size} rows")
    differing = [name for name in MAKES_IDS if found[name] != wanted[name]]
    if differing:
        findings.append(f"{TOKENIZER_JSON_NAME}: {', '.join(differing)} not as made from {TOKENIZER_NAME}")
    return findings


def inexact_text(tokenizer: MistralLargeTokenizer, processor: SentencePieceProcessor) -> str | None:
    """The first text of the corpus whose ids are not SentencePiece's, or None."""
    rows = zip(CORPUS, tokenizer.encode_texts(CORPUS), processor.encode(list(CORPUS)), strict=True)
    return next((text for text, ids, exact in rows if ids != exact), None)
