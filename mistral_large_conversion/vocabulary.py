"""The vocabularies of v3 and v7: control tokens, ids of the kinds of pieces, and how a file of them is recognised.

The two have the same pieces and scores but for seven names. v3 is that of Mistral-Large-Instruct-2407, v7 of 2411.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from mistral_large_conversion.errors import TokenizerFileError

VOCAB_SIZE = 32768

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"

# The control tokens of the v3 instruct format, and what v7 adds to them.
CONTROL_TOKENS = {
    BOS: 1,
    EOS: 2,
    "[INST]": 3,
    "[/INST]": 4,
    "[TOOL_CALLS]": 5,
    "[AVAILABLE_TOOLS]": 6,
    "[/AVAILABLE_TOOLS]": 7,
    "[TOOL_RESULTS]": 8,
    "[/TOOL_RESULTS]": 9,
}
CONTROL_TOKENS_OF_V7 = {**CONTROL_TOKENS, "[SYSTEM_PROMPT]": 16, "[/SYSTEM_PROMPT]": 17, "[TOOL_CONTENT]": 18}

# `<unk>` and the 750 control pieces, the 20 user-defined pieces, the 256 bytes, then the pieces of text.
UNUSED_IDS = range(10, 14)

CONTROL_IDS, REFERENCE_IDS, BYTE_IDS, TEXT_IDS = range(751), range(751, 771), range(771, 1027), range(1027, VOCAB_SIZE)

NEWLINE_ID = BYTE_IDS[ord("\n")]

BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256)}

# The context length of the model, in tokens.
MAX_LENGTH = 131072
# A control piece that never got a meaning, and so can never be part of a prompt or a response.
PAD = "[control_382]"
SPECIAL_IDS = {"bos_token_id": CONTROL_TOKENS[BOS], "eos_token_id": CONTROL_TOKENS[EOS], "pad_token_id": 384}
# Pieces at fixed ids. Those of 10 to 13 are left open: neither format uses them, and fine-tunes name them anew.
PIECES_OF_V3 = {
    0: UNKNOWN,
    **{index: token for token, index in CONTROL_TOKENS.items()},
    **{index: f"[control_{index - 2}]" for index in range(14, CONTROL_IDS.stop)},
    **{index: f"[REFERENCE_DOC_{770 - index}]" for index in REFERENCE_IDS},
    **{BYTE_IDS[byte]: piece for piece, byte in BYTE_PIECES.items()},
}
PIECES_OF_V7 = {
    **PIECES_OF_V3,
    14: "[IMG_BREAK]",
    15: "[IMG_END]",
    749: "[/REF]",
    750: "[REF]",
    **{index: token for token, index in CONTROL_TOKENS_OF_V7.items()},
}

# The pieces of text decide about merges and words, so all are compared; both vocabularies have the same.
TEXT_PIECES_SHA256 = "53a6491d971065614a9a39edcf88f81a9bccbc3df7e5e0ba82f65a5bca761bfa"


@dataclass(frozen=True)
class Vocabulary:
    """One of the vendor's vocabularies of 32768 pieces.

    name: also that of the prompt format that was made for it.
    file_name: of the vendor's SentencePiece file.
    control_tokens: ids of the control tokens that prompts and completions of this format hold.
    fixed_pieces: pieces by id, without those of text.
    control_ids: `<unk>` and the control pieces, which no text gives.
    user_defined_ids: pieces that SentencePiece takes whole out of a text.
    """

    name: str
    file_name: str
    control_tokens: Mapping[str, int]
    fixed_pieces: Mapping[int, str]
    control_ids: range
    user_defined_ids: range


V3 = Vocabulary("v3", "tokenizer.model.v3", CONTROL_TOKENS, PIECES_OF_V3, CONTROL_IDS, REFERENCE_IDS)
V7 = Vocabulary("v7", "tokenizer.model.v7", CONTROL_TOKENS_OF_V7, PIECES_OF_V7, range(749), range(749, 771))
VOCABULARIES = {each.name: each for each in (V3, V7)}
# The piece of this id is another one in each.
TELLING_ID = 749

# The vendor's file has the last name in mirrors and fine-tunes; other vocabularies have it too.
VOCABULARY_NAMES = (*(each.file_name for each in VOCABULARIES.values()), "tokenizer.model")

# The vendor's files themselves, and everything in them that decides about an id: see `_content_sha256`.
KNOWN_FILES = {
    "9addc8bdce5988448ae81b729336f43a81262160ae8da760674badab9d4c7d33": "v3",
    "1b968b8dc352f42192367337c78ccc61e1eaddc6d641a579372d4f20694beb7a": "v7",
}

# Those of the vendor have half a megabyte.
LARGEST_MODEL = 100_000_000

KNOWN_VOCABULARIES = {
    "ab8a3423b8d0fed7acee4a989ff6ecabd22edc2d13f6cd7c9c89da1149c71ac7": "v3",
    "950be373dfaef20b85a14230c8049681aca0b01bd255bf54a62068b9e9eb30bd": "v7",
}

# Field numbers in SentencePiece's ModelProto, and in its specs those that change ids, with their defaults: the model
# type, white space as a suffix, byte fallback; the character map, dummy prefix, extra white space, escaped white space.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3

_TRAINER_FIELDS: dict[int, bytes | int] = {3: 1, 24: 0, 35: 0}

_NORMALIZER_FIELDS: dict[int, bytes | int] = {2: b"", 3: 1, 4: 1, 5: 1}

_CONTROL_TYPE = 3

# No text holds one; `surrogateescape` decodes a byte that is not part of a character to one.
SURROGATE = re.compile("[\ud800-\udfff]")


def known_vocabulary(file: Path | str) -> str | None:
    """Return the name of the vocabulary whose pieces, scores, types and settings a SentencePiece file has, or None.

    Names of files prove nothing: mirrors call the same file `tokenizer.model`, and so are other models called.
    """
    try:
        if not Path(file).is_file() or Path(file).stat().st_size > LARGEST_MODEL:
            return None
        model = Path(file).read_bytes()
        return KNOWN_FILES.get(sha256(model).hexdigest()) or KNOWN_VOCABULARIES.get(_content_sha256(model))
    except (OSError, ValueError):
        return None


def find_vocabulary(folder: Path) -> Path | None:
    """Return the vendor's SentencePiece file in a folder: under a name of its own, or under another one if it is known.

    Of the names only those with a version say which vocabulary it is.

    Raises TokenizerFileError where there are two of those.
    """
    *own, other = (folder / name for name in VOCABULARY_NAMES)
    present = [path for path in own if path.exists() or path.is_symlink()]
    if len(present) > 1:
        names = " and ".join(path.name for path in present)
        raise TokenizerFileError(
            f"{folder}: {names}: the vocabularies of two models; a checkpoint has one; remove the file that is not of "
            "this checkpoint"
        )
    if present:
        return present[0]
    return None if known_vocabulary(other) is None else other


def recognize_pieces(pieces: Sequence[str | None]) -> str | None:
    """Return the name of the vocabulary whose pieces these are, by id, or None; None in it stands for no piece.

    The names of pieces 10 to 13 do not matter, nor what comes after the vocabulary.
    """
    if len(pieces) < VOCAB_SIZE or text_pieces_sha256(pieces) != TEXT_PIECES_SHA256:
        return None
    return next(
        (
            name
            for name, vocabulary in VOCABULARIES.items()
            if all(pieces[index] == piece for index, piece in vocabulary.fixed_pieces.items())
        ),
        None,
    )


def text_pieces_sha256(pieces: Sequence[str | None]) -> str:
    """Return the hash of the pieces of text."""
    return sha256("\n".join([piece or "" for piece in pieces[TEXT_IDS.start : TEXT_IDS.stop]]).encode()).hexdigest()


def _content_sha256(model: bytes) -> str:
    """Return the hash of what decides about ids in a serialized ModelProto; raise ValueError where it is none.

    The names of pieces 10 to 13 are left out, which neither format uses, and so is how the model was trained.
    """
    hashed = sha256()
    specs: dict[int, dict[int, bytes | int]] = {_TRAINER: {}, _NORMALIZER: {}}
    index = 0
    for field, value in _proto_fields(model):
        if field == _PIECES and isinstance(value, bytes):
            piece: dict[int, bytes | int] = {1: b"", 2: bytes(4), 3: 1, **dict(_proto_fields(value))}
            name = b"" if index in UNUSED_IDS and piece[3] == _CONTROL_TYPE else piece[1]
            hashed.update(b"%d %r %r %r\n" % (index, name, piece[2], piece[3]))
            index += 1
        elif field in specs and isinstance(value, bytes):
            specs[field].update(_proto_fields(value))
    for field, defaults in ((_TRAINER, _TRAINER_FIELDS), (_NORMALIZER, _NORMALIZER_FIELDS)):
        hashed.update(b"%r\n" % [specs[field].get(number, default) for number, default in defaults.items()])
    return hashed.hexdigest()


def _proto_fields(message: bytes) -> Iterator[tuple[int, bytes | int]]:
    """Yield number and value of each field of a protobuf message; protobuf itself is no dependency of this package."""
    position, size = 0, len(message)

    def varint() -> int:
        nonlocal position
        number = shift = 0
        while True:
            if position >= size or shift > 63:
                raise ValueError("not a protobuf message")
            byte = message[position]
            position += 1
            if byte < 0x80:
                return number | byte << shift
            number |= (byte & 0x7F) << shift
            shift += 7

    while position < size:
        tag = varint()
        if (wire := tag & 7) == 0:
            yield tag >> 3, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}.get(wire, size)
        if length > size - position:
            raise ValueError("not a protobuf message")
        yield tag >> 3, message[position : position + length]
        position += length


def piece_bytes(piece: str) -> bytes:
    """Return the bytes of UTF-8 that a piece stands for."""
    return bytes([BYTE_PIECES[piece]]) if piece in BYTE_PIECES else piece.replace("▁", " ").encode()


def join_pieces(pieces: Iterable[str]) -> str:
    """Return the text of pieces as SentencePiece does: � for each byte that is not part of a character.

    A ▁ at the start is the dummy; a space that a byte piece stands for is part of the text.
    """
    pieces = list(pieces)
    if pieces:
        pieces[0] = pieces[0].removeprefix("▁")
    text = b"".join(map(piece_bytes, pieces)).decode("utf-8", errors="surrogateescape")
    return SURROGATE.sub("\ufffd", text)
