"""The vendor's SentencePiece models as `tokenizers.Tokenizer`s that give the same ids for every text."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mistral_large_conversion.errors import TokenizerFileError
from mistral_large_conversion.vocabulary import (
    BOS,
    CONTROL_TOKENS,
    TELLING_ID,
    TEXT_IDS,
    TEXT_PIECES_SHA256,
    UNKNOWN,
    VOCAB_SIZE,
    VOCABULARIES,
    Vocabulary,
    known_vocabulary,
    recognize_pieces,
    text_pieces_sha256,
)

RULE = "this package reads the v3 and v7 SentencePiece models of Mistral-Large-Instruct-2407 and 2411"
WAY_OUT = "pass a folder with tokenizer.model.v3 or .v7, or with the files that save_pretrained wrote"

# The user-defined pieces of each vocabulary.
_REFERENCES = {"v3": r"\[REFERENCE_DOC_1?[0-9]\]", "v7": r"\[(?:REFERENCE_DOC_1?[0-9]|/?REF)\]"}
# A word is a user-defined piece, or a run of ▁ with what follows it, or what follows such a piece without a ▁. Words
# keep the backend's cache useful, and no piece spans two of them, so no id changes. After a user-defined piece, a
# closing bracket that follows a letter or digit begins a word as well: the `[INST]` or `</s>` of a text would be a word
# of its own otherwise, which `ignore_merges` would look up as the control piece. No piece has such a bracket inside.
_WORDS = {
    name: rf"{reference}"
    rf"|▁+(?:[^▁\[]|(?!{reference})\[)*"
    rf"|[^▁](?:(?!{reference}|(?<=[A-Za-z0-9])[\]>])[^▁])*"
    for name, reference in _REFERENCES.items()
}
# The same where user-defined pieces are text as well: each is two words, and so never looked up.
_WORDS_OF_TEXT = {
    "v3": r"▁*(?:(?!(?<=\[)REFERENCE_DOC_)[^▁])+|▁+|REFERENCE_DOC_",
    "v7": r"▁*(?:(?!(?<=\[)(?:REFERENCE_DOC_|REF\])|(?<=\[/)REF\])[^▁])+|▁+|REFERENCE_DOC_|REF",
}

# Words between user-defined pieces, cut smaller where no piece spans the cut either: around a digit, and between an
# ASCII letter and ASCII punctuation. They are so few that their ids can be remembered.
_SMALL_WORD = re.compile(
    r"▁*[A-Za-z]+(?![^\x00-@\[-`{-\x7f▁])"
    r"|▁*[\x00-/:-@\[-`{-\x7f]+(?![^0-9A-Za-z▁])"
    r"|▁*[^0-9▁]+"
    r"|▁+"
    r"|[0-9]"
)
_CUTS_AT_REFERENCES = {name: re.compile(f"({reference})") for name, reference in _REFERENCES.items()}
MOST_WORDS = 100_000
LONGEST_WORD = 50


# What a model with the same pieces can do in another way: merges, dummy ▁, white space, normalisation, user-defined
# pieces.
_PROBE = (
    " a  b\t\r\n▁c tokenisation ﬁ Ⅷ ｆｕｌｌ e\u0301 🎉\x00 [INST]</s>[REFERENCE_DOC_7][INST]x[REF]y[/REF]" + " " * 37
)


def load_sentencepiece_bpe(path: str | os.PathLike[str]) -> Tokenizer:
    """Read `tokenizer.model.v3` or `.v7` into a backend with SentencePiece's ids, see `build_backend`.

    Raises `TokenizerFileError` where the file is missing, is none of the two, or would not be matched exactly.
    """
    if not Path(path).is_file():
        raise TokenizerFileError(f"{path}: no such file; {RULE}; {WAY_OUT}")
    try:
        processor = load_processor(Path(path))
    except (RuntimeError, OSError) as error:
        raise TokenizerFileError(f"{path}: not a SentencePiece model; {RULE}; {WAY_OUT}") from error
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    name = _check_pieces(path, pieces).name
    backend = build_backend(pieces)
    if _encode_as_text(backend, _PROBE) != processor.encode(_PROBE):
        raise TokenizerFileError(f"{path}: has {name}'s pieces, but encodes text in another way; {RULE}; {WAY_OUT}")
    if known_vocabulary(Path(path)) != name:
        raise TokenizerFileError(
            f"{path}: has {name}'s pieces, but other scores, types or settings than the vendor's file; {RULE}; "
            f"{WAY_OUT}"
        )
    return backend


def build_backend(pieces: Sequence[str]) -> Tokenizer:
    """Build the backend of a vocabulary from its pieces by id, which `recognize_pieces` knows.

    Its ids are SentencePiece's, after `<s>` where special tokens are on. The scores of pieces fall with their ids, but
    for runs of ▁, so the pieces say all that decides about ids.

    The dummy ▁ goes before the first text only, so that a rendered prompt writes it as the space it stands for:
    `<s>[INST] text[/INST]`. Control strings become control ids unless `encode_special_tokens` is set.
    """
    name = recognize_pieces(pieces)
    assert name is not None, "pieces of another vocabulary"
    vocabulary, pieces = VOCABULARIES[name], pieces[:VOCAB_SIZE]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[*_text_merges(pieces[TEXT_IDS.start :]), *_space_merges()],
            unk_token=UNKNOWN,
            byte_fallback=True,
            # A user-defined piece has no merges: it is a word, and looked up as a whole. So is any other word that is
            # a piece, which its merges would give as well.
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizer(vocabulary)
    backend.decoder = _decoder()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS}:1 $B:1",
        special_tokens=[(BOS, CONTROL_TOKENS[BOS])],
    )
    backend.add_special_tokens(list(pieces[: vocabulary.control_ids.stop]))
    return backend


def vocabulary_of(backend: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a backend that `build_backend` built, whatever was added to it."""
    return next(
        each for each in VOCABULARIES.values() if backend.id_to_token(TELLING_ID) == each.fixed_pieces[TELLING_ID]
    )


def read_tokenizer_json(path: str | os.PathLike[str]) -> Tokenizer:
    """Read the backend that `load_sentencepiece_bpe` built and `save_pretrained` wrote, with tokens added since.

    Raises `TokenizerFileError` where the file is missing, cannot be read, or holds another tokenizer.
    """
    if not Path(path).is_file():
        raise TokenizerFileError(f"{path}: no such file; {RULE}; {WAY_OUT}")
    try:
        # The library reads no path that is not UTF-8.
        backend = Tokenizer.from_buffer(Path(path).read_bytes())
    # The Rust library raises nothing more specific.
    except Exception as error:
        raise TokenizerFileError(f"{path}: not a tokenizer.json ({error}); {RULE}; {WAY_OUT}") from error
    check_backend(backend, path)
    return backend


def check_backend(backend: Tokenizer, source: str | os.PathLike[str]) -> None:
    """Raise `TokenizerFileError` for a backend that `load_sentencepiece_bpe` did not build.

    source: what to call it.
    """
    pieces = list(map(backend.id_to_token, range(backend.get_vocab_size(with_added_tokens=False))))
    vocabulary = _check_pieces(source, pieces)
    # Conversions by others have the same pieces, but not the same ids for every text.
    model, splitter, decoder = backend.model, backend.pre_tokenizer, backend.decoder
    if not (
        isinstance(model, models.BPE)
        and (model.ignore_merges, model.byte_fallback, backend.normalizer) == (True, True, None)
        and splitter is not None
        and splitter.__getstate__() == pre_tokenizer(vocabulary).__getstate__()
        and decoder is not None
        and decoder.__getstate__() == _decoder().__getstate__()
    ):
        raise TokenizerFileError(
            f"{source}: has {vocabulary.name}'s pieces, but another program converted it; {RULE}; {WAY_OUT}"
        )


def load_processor(path: Path) -> SentencePieceProcessor:
    """The SentencePiece model in a file, which the library itself does not open under a path that is not UTF-8.

    Raises `RuntimeError` for any other content, `OSError` for a file that cannot be read.
    """
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())
    return processor


def _check_pieces(path: str | os.PathLike[str], pieces: Sequence[str | None]) -> Vocabulary:
    if len(pieces) != VOCAB_SIZE:
        raise TokenizerFileError(f"{path}: {len(pieces)} pieces, v3 and v7 have {VOCAB_SIZE}; {RULE}; {WAY_OUT}")
    if (name := recognize_pieces(pieces)) is not None:
        return VOCABULARIES[name]
    # That of the two which it is more like.
    differing = [
        [index for index, piece in vocabulary.fixed_pieces.items() if pieces[index] != piece]
        for vocabulary in VOCABULARIES.values()
    ]
    vocabulary, indices = min(zip(VOCABULARIES.values(), differing, strict=True), key=lambda pair: len(pair[1]))
    if indices:
        index = indices[0]
        raise TokenizerFileError(
            f"{path}: piece {index} is {pieces[index]!r}, {vocabulary.name}'s is {vocabulary.fixed_pieces[index]!r}; "
            f"{RULE}; {WAY_OUT}"
        )
    assert text_pieces_sha256(pieces) != TEXT_PIECES_SHA256, "nothing else is compared"
    raise TokenizerFileError(f"{path}: other pieces than {vocabulary.name}'s for text; {RULE}; {WAY_OUT}")


def _text_merges(pieces: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield every way to build each piece from two others, best score first: the runs of ▁ apart, that is by id."""
    known = set(pieces)
    for piece in pieces:
        if piece.strip("▁"):
            for cut in range(1, len(piece)):
                if (start := piece[:cut]) in known and (end := piece[cut:]) in known:
                    yield start, end


def _space_merges() -> Iterator[tuple[str, str]]:
    """Yield the merges of runs of ▁, which come after all others.

    Their pieces are 1 to 14 and 16 long and share one score, so SentencePiece always merges the leftmost pair that
    makes a piece. The leftmost run thus grows by one ▁ at a time to 14; there it stops, as no piece is 15 long, and
    the next run grows, to 2: then 14 and 2 make 16. No other merge ever happens, and at any time at most one run has
    a length from 2 to 13. Ranked by falling length, that run grows before a new one begins: the same result from
    merges that have no ties.
    """
    yield "▁" * 14, "▁" * 2
    for length in range(13, 0, -1):
        yield "▁" * length, "▁"


def added_tokens(backend: Tokenizer) -> list[tuple[int, AddedToken]]:
    """Return the tokens beyond the vendor's vocabulary with their ids, in the order of these."""
    return [
        (index, token) for index, token in sorted(backend.get_added_tokens_decoder().items()) if index >= VOCAB_SIZE
    ]


def clone_backend(
    backend: Tokenizer,
    *,
    added: Sequence[AddedToken] | None = None,
    dummy: bool = True,
    reference_documents_as_text: bool = False,
) -> Tokenizer:
    """Return a backend on the same model, which is not copied, with settings of its own.

    added: its added tokens, in the order of their ids, instead of all of the backend's.
    dummy, reference_documents_as_text: see `pre_tokenizer`.
    """
    clone = Tokenizer(backend.model)
    clone.pre_tokenizer = pre_tokenizer(
        vocabulary_of(backend), dummy=dummy, reference_documents_as_text=reference_documents_as_text
    )
    clone.decoder = backend.decoder
    if backend.post_processor is not None:
        clone.post_processor = backend.post_processor
    if added is None:
        added = [token for _, token in sorted(backend.get_added_tokens_decoder().items())]
    clone.add_tokens(list(added))
    return clone


def pre_tokenizer(
    vocabulary: Vocabulary, *, dummy: bool = True, reference_documents_as_text: bool = False
) -> pre_tokenizers.PreTokenizer:
    """Return what writes spaces as ▁, puts the dummy ▁ before the first text, and cuts the text into words.

    dummy: false for a text that goes on after a control token.
    """
    words = (_WORDS_OF_TEXT if reference_documents_as_text else _WORDS)[vocabulary.name]

    def metaspace(replacement: str, prepend_scheme: str) -> pre_tokenizers.PreTokenizer:
        return pre_tokenizers.Metaspace(replacement=replacement, prepend_scheme=prepend_scheme, split=False)

    return pre_tokenizers.Sequence(
        [
            metaspace("▁", "never"),
            # Metaspace prepends nothing to a text that begins with its replacement, and SentencePiece always does:
            # with a space as the replacement it always prepends, as no space is left.
            metaspace(" ", "first" if dummy else "never"),
            metaspace("▁", "never"),
            pre_tokenizers.Split(Regex(words), "isolated"),
        ]
    )


class TextEncoder:
    """Gives the ids that a backend without added tokens gives to a whole text in which control strings are text.

    It looks words up that it has seen before, which takes a fraction of the backend's time, and keeps no offsets.
    A user-defined piece is SentencePiece's own, or text like any other with `reference_documents_as_text`.
    """

    def __init__(self, backend: Tokenizer, *, reference_documents_as_text: bool = False) -> None:
        self._word_ids = _WordIds(backend.model)
        vocabulary = vocabulary_of(backend)
        self._cut = _SMALL_WORD.findall if reference_documents_as_text else partial(small_words, vocabulary)

    def __call__(self, text: str) -> list[int]:
        words = self._cut(f"▁{text.replace(' ', '▁')}") if text else ()
        return list(chain.from_iterable(map(self._word_ids.__getitem__, words)))


def small_words(vocabulary: Vocabulary, marked_text: str) -> list[str]:
    """Cut a text whose spaces are marked into words that are encoded one by one, as no piece spans two of them."""
    if "REF" not in marked_text:
        return _SMALL_WORD.findall(marked_text)
    # Every second part is a user-defined piece.
    parts = enumerate(_CUTS_AT_REFERENCES[vocabulary.name].split(marked_text))
    return [word for number, part in parts for word in ([part] if number % 2 else _SMALL_WORD.findall(part))]


class _WordIds(dict[str, list[int]]):
    """The ids of words; those of a word that is not remembered come from the backend's model."""

    def __init__(self, model: models.Model) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, word: str) -> list[int]:
        ids = [token.id for token in self._model.tokenize(word)]
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1, right=0)]
    )


def _encode_as_text(backend: Tokenizer, text: str) -> list[int]:
    backend.encode_special_tokens = True
    ids: list[int] = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    return ids
