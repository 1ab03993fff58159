"""A SentencePiece file of a known vocabulary, made of its pieces: for folders that have a tokenizer.json alone."""

import struct
from collections.abc import Sequence
from functools import lru_cache

from mistral_large_conversion.vocabulary import (
    BYTE_IDS,
    TEXT_IDS,
    VOCAB_SIZE,
    VOCABULARIES,
    recognize_pieces,
)

# Types of pieces in ModelProto.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
# The pieces of text are in the order of their scores; runs of ▁ come after all others.
_SCORE_OF_SPACES = -1e9

# What changes ids, see `vocabulary`: BPE, byte fallback, no character map, a dummy prefix, all white space kept,
# escaped. The other fields are those that readers look for: the size, and the ids and names of special pieces.
_TRAINER: dict[int, bytes | int] = {
    3: 2,
    4: VOCAB_SIZE,
    24: 0,
    35: 1,
    40: 0,
    41: 1,
    42: 2,
    43: 2**64 - 1,
    44: " \u2047 ".encode(),
    45: b"<unk>",
    46: b"<s>",
    47: b"</s>",
}
_NORMALIZER: dict[int, bytes | int] = {1: b"identity", 2: b"", 3: 1, 4: 0, 5: 1}


def sentencepiece_model(pieces: Sequence[str]) -> bytes:
    """Return a serialized ModelProto with the ids of the vendor's file, of pieces that `recognize_pieces` knows."""
    name = recognize_pieces(pieces)
    assert name is not None, "pieces of another vocabulary"
    vocabulary = VOCABULARIES[name]

    def kind(index: int) -> int:
        if index in vocabulary.control_ids:
            return _CONTROL if index else _UNKNOWN
        if index in vocabulary.user_defined_ids:
            return _USER_DEFINED
        return _BYTE if index in BYTE_IDS else _NORMAL

    def score(index: int) -> float:
        if index not in TEXT_IDS:
            return 0.0
        return float(TEXT_IDS.start - index) if pieces[index].strip("▁") else _SCORE_OF_SPACES

    encoded = [
        _field(1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score(index)) + _field(3, kind(index)))
        for index, piece in enumerate(pieces[:VOCAB_SIZE])
    ]
    specs = [(2, _TRAINER), (3, _NORMALIZER)]
    encoded += [_field(number, b"".join(_field(*field) for field in spec.items())) for number, spec in specs]
    return b"".join(encoded)


def _field(number: int, value: bytes | int) -> bytes:
    """Return a field of a protobuf message: a whole number, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


# Tags, lengths and types are the same few for all pieces.
@lru_cache(maxsize=1024)
def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
