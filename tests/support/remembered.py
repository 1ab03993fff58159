"""What is made of a vocabulary, remembered by its whole input, for tests that are not about how it is made.

Many tests convert, adopt, verify and load folders of the same two vocabularies. Each would make the same backend and
the same SentencePiece file anew, which takes most of its time. The first call with an input is the real one. That ids
are exact is proven each time.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from mistral_large_conversion import folder_tokenizer, sentencepiece_bpe, tokenizer, vocabulary
from mistral_large_conversion.checkpoint import source_files
from mistral_large_conversion.checkpoint.layout import TOKENIZER_JSON_NAME
from mistral_large_conversion.sentencepiece_model import sentencepiece_model as model_of_pieces

# Few, as some tests make many that are all different.
MOST = 16
_content_sha256 = lru_cache(MOST)(vocabulary._content_sha256)
_model_of_pieces = lru_cache(MOST)(model_of_pieces)
_backend_of_pieces = lru_cache(MOST)(sentencepiece_bpe.build_backend)
_read: dict[bytes, Tokenizer] = {}


@lru_cache(4)
def _parsed(content: bytes) -> dict[str, Any]:
    return source_files.parse_json_object(content)


def read_json_object(path: Path) -> dict[str, Any]:
    """An object that the reader of tokenizers, which changes nothing in it, gets again."""
    is_large = path.is_file() and path.stat().st_size > source_files.LARGEST_JSON
    if path.name != TOKENIZER_JSON_NAME or not path.is_file() or is_large:
        return source_files.read_json_object(path)
    return _parsed(path.read_bytes())


@lru_cache(4)
def _processor(content: bytes) -> SentencePieceProcessor:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor


def load_processor(path: Path) -> SentencePieceProcessor:
    """A SentencePiece model that is there, and whose readers change nothing in it."""
    return _processor(path.read_bytes())


def sentencepiece_model(pieces: Sequence[str]) -> bytes:
    return _model_of_pieces(tuple(pieces))


def build_backend(pieces: Sequence[str]) -> Tokenizer:
    """A backend of its own on the model that was built first."""
    return sentencepiece_bpe.clone_backend(_backend_of_pieces(tuple(pieces)))


def read_tokenizer_json(path: str | os.PathLike[str]) -> Tokenizer:
    """A backend of its own on the model that was read first, where a clone has all that the file says."""
    content = Path(path).read_bytes() if Path(path).is_file() else b""
    if content not in _read:
        backend = sentencepiece_bpe.read_tokenizer_json(path)
        if sentencepiece_bpe.clone_backend(backend).to_str() != backend.to_str():
            return backend
        if len(_read) >= MOST:
            _read.clear()
        _read[content] = backend
    return sentencepiece_bpe.clone_backend(_read[content])


@pytest.fixture(scope="package", autouse=True)
def remembered_vocabularies() -> Iterator[None]:
    """Remember what is made of vocabularies, wherever the converter makes it, in the packages that import this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_content_sha256", _content_sha256)
        patch.setattr(folder_tokenizer, "read_json_object", read_json_object)
        patch.setattr(folder_tokenizer, "sentencepiece_model", sentencepiece_model)
        for module in (folder_tokenizer, sentencepiece_bpe):
            patch.setattr(module, "load_processor", load_processor)
        for module in (folder_tokenizer, sentencepiece_bpe, tokenizer):
            patch.setattr(module, "build_backend", build_backend)
        patch.setattr(tokenizer, "read_tokenizer_json", read_tokenizer_json)
        # The ground floor does without.
        if (library := sys.modules.get("modeling_mistral_large.tokenization_mistral_large")) is not None:
            patch.setattr(library, "read_tokenizer_json", read_tokenizer_json)
        yield
