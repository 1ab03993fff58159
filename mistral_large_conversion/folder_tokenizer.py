"""The tokenizer of any folder: which vocabulary it has, what was added to it, which prompts it takes.

A vocabulary is recognised by its pieces, whatever program wrote them down, and the exact tokenizer is made of them.
One that is not recognised is carried along unchanged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from mistral_large_conversion.checkpoint.layout import (
    CHAT_TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    TOKENIZER_JSON_NAME,
    Layout,
    is_consolidated,
)
from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object, shown
from mistral_large_conversion.errors import SettingError, TokenizerFileError
from mistral_large_conversion.folder_templates import read_chat_templates
from mistral_large_conversion.options import check_option
from mistral_large_conversion.prompt_format import RecognizedFormat, recognize_prompt_format
from mistral_large_conversion.sentencepiece_bpe import build_backend, load_processor
from mistral_large_conversion.sentencepiece_model import sentencepiece_model
from mistral_large_conversion.vocabulary import (
    CONTROL_IDS,
    REFERENCE_IDS,
    VOCAB_SIZE,
    VOCABULARIES,
    VOCABULARY_NAMES,
    find_vocabulary,
    known_vocabulary,
    recognize_pieces,
)

ADDED_TOKENS_NAME = "added_tokens.json"
SPECIAL_TOKENS_NAME = "special_tokens_map.json"
# All that a tokenizer of another vocabulary may consist of: it is copied, never made anew.
CARRIED_NAMES = (
    TOKENIZER_JSON_NAME,
    TOKENIZER_CONFIG_NAME,
    SPECIAL_TOKENS_NAME,
    ADDED_TOKENS_NAME,
    CHAT_TEMPLATE_NAME,
    *VOCABULARY_NAMES,
    "vocab.json",
    "merges.txt",
)
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
PromptFormat = Literal["v3", "v7", "own"]
PROMPT_FORMATS = ("own", *VOCABULARIES)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class FolderTokenizer:
    """What the tokenizer of a folder is.

    vocabulary: "v3", "v7", or None for another one, of which nothing is made.
    source: the file whose pieces are taken.
    pieces: those of a known vocabulary by id, 32768 of them; empty for another one.
    added: tokens beyond it, with ids from 32768 on and the flags that the folder gives them.
    special_tokens: names such as `eos_token` that the folder gives a text of its own.
    chat_templates: by name, "default" first; empty if the folder has none.
    prompt_format: "v3", "v7", or None for that of the folder's own template.
    format_reason: why, in words.
    remarks: what is not exact, or not taken, one line each.
    """

    folder: Path
    vocabulary: str | None
    source: str
    pieces: tuple[str, ...] = field(repr=False)
    added: tuple[AddedToken, ...]
    special_tokens: Mapping[str, str]
    chat_templates: Mapping[str, str] = field(repr=False)
    prompt_format: str | None
    format_reason: str
    remarks: tuple[str, ...]
    model_file: str | None

    @property
    def chat_template(self) -> str | None:
        """The folder's own chat template, or None where it has none or its prompt format is known."""
        return None if self.prompt_format is not None else self.chat_templates.get("default")

    @cached_property
    def backend(self) -> Tokenizer:
        """The exact backend of a known vocabulary, with the added tokens."""
        assert self.vocabulary is not None, "nothing is made of another vocabulary"
        backend = build_backend(self.pieces)
        backend.add_tokens(list(self.added))
        return backend

    @cached_property
    def sentencepiece(self) -> bytes:
        """The SentencePiece file of a known vocabulary: the folder's own, or one made of the pieces."""
        assert self.vocabulary is not None, "nothing is made of another vocabulary"
        if self.model_file is not None:
            return (self.folder / self.model_file).read_bytes()
        return sentencepiece_model(self.pieces)

    def carried_files(self) -> dict[str, bytes]:
        """Names and contents of the tokenizer's files in the folder, unchanged.

        Raises:
            TokenizerFileError: one that cannot be read.
        """
        names = [name for name in CARRIED_NAMES if (self.folder / name).exists()]
        for name in names:
            if problem := file_problem(self.folder, name):
                raise TokenizerFileError(f"{self.folder}: {problem}; download it again")
        return {name: (self.folder / name).read_bytes() for name in names}


def read_folder_tokenizer(
    folder: Path | str, *, layout: Layout | None = None, prompt_format: str | None = None
) -> FolderTokenizer:
    """Read the tokenizer of a folder from its files.

    layout: that whose files are read; without it, that of the folder. In the consolidated layout, the SentencePiece
        file counts, and a tokenizer.json next to it does not.
    prompt_format: "v3", "v7" or "own", to decide instead of what the chat template renders.

    Raises:
        TokenizerFileError: no tokenizer, or files that cannot be read.
        SettingError: a prompt format that this folder cannot have.
    """
    folder = Path(folder)
    check_option("prompt_format", prompt_format, (None, *PROMPT_FORMATS))
    if layout is None:
        layout = "consolidated" if is_consolidated(folder) else "hf"
    own = find_vocabulary(folder)
    if own is not None and (problem := file_problem(folder, own.name)):
        raise TokenizerFileError(f"{folder}: {problem}; download it again")
    is_hf = layout == "hf"
    settings = _read_json(folder, TOKENIZER_CONFIG_NAME) if is_hf else {}
    entries = _Entries(folder)
    if is_hf:
        entries.add_settings(settings)
    if is_hf and (folder / TOKENIZER_JSON_NAME).exists():
        source = TOKENIZER_JSON_NAME
        pieces = _pieces_of_json(folder, entries)
    else:
        source, pieces = _pieces_of_model(folder, own)
    if is_hf:
        entries.add_names()
    vocabulary = recognize_pieces(pieces) if not entries.problems else None
    if source != TOKENIZER_JSON_NAME and known_vocabulary(folder / source) != vocabulary:
        entries.problems.append(f"{source} has {vocabulary}'s pieces, but other scores, types or settings")
        vocabulary = None
    if vocabulary is not None:
        entries.check(pieces)
        vocabulary = None if entries.problems else vocabulary
    remarks = list(entries.problems)
    model_file = None
    if own is not None:
        model_pieces = _sentencepiece_pieces(own)
        if vocabulary is not None and known_vocabulary(own) == vocabulary and model_pieces == pieces[:VOCAB_SIZE]:
            model_file = own.name
        elif source == TOKENIZER_JSON_NAME:
            remarks.append(
                f"{own.name} has other pieces than {source}, which is what the checkpoint was tuned with: not read"
            )
    if vocabulary is None:
        remarks.append(
            f"{source}: neither the v3 nor the v7 vocabulary, so its files are carried along unchanged: ids are those "
            "of its own program, and control strings in a text may become control tokens"
        )
    added = entries.tokens() if vocabulary is not None else ()
    templates = read_chat_templates(folder, settings) if is_hf else {}
    special_tokens = _special_tokens(folder, settings) if is_hf else {}
    template = templates.get("default")
    found = recognize_prompt_format(template, vocabulary, special_tokens)
    if templates and template is None:
        found = RecognizedFormat(None, f"chat templates of names of their own: {', '.join(templates)}")
    if vocabulary is not None:
        known_texts = {*pieces, *(token.content for token in added)}
        unknown = {name: text for name, text in special_tokens.items() if text not in known_texts}
        remarks += [f"{name} {shown(text)} is no token of the vocabulary: not taken" for name, text in unknown.items()]
        special_tokens = {name: text for name, text in special_tokens.items() if name not in unknown}
    chosen = found if prompt_format is None else _chosen(prompt_format, found, vocabulary, template)
    return FolderTokenizer(
        folder=folder,
        vocabulary=vocabulary,
        source=source,
        pieces=tuple(map(str, pieces[:VOCAB_SIZE])) if vocabulary is not None else (),
        added=added,
        special_tokens=special_tokens,
        chat_templates=templates,
        prompt_format=chosen.name,
        format_reason=chosen.reason,
        remarks=tuple(remarks),
        model_file=model_file,
    )


def _chosen(
    prompt_format: str, found: RecognizedFormat, vocabulary: str | None, template: str | None
) -> RecognizedFormat:
    """The prompt format that was asked for.

    Raises:
        SettingError: it cannot be.
    """
    asked = f"prompt_format {prompt_format!r}"
    if prompt_format == "own":
        if template is None:
            raise SettingError(f"{asked}: the folder has no chat template of its own; leave it out")
        return RecognizedFormat(None, "asked for")
    if vocabulary is None:
        raise SettingError(
            f"{asked}: the vocabulary of the folder is neither v3's nor v7's; leave it out, or take 'own'"
        )
    if prompt_format == "v7" and vocabulary == "v3":
        raise SettingError(f"{asked}: the v3 vocabulary of the folder has no [SYSTEM_PROMPT]; take 'v3' or 'own'")
    return RecognizedFormat(prompt_format, f"asked for; without that: {found.name or 'own'}, as {found.reason}")


class _Entries:
    """Tokens that the files of a folder name by id, and where they contradict each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.problems: list[str] = []
        self._entries: dict[int, AddedToken] = {}

    def add_settings(self, settings: Mapping[str, Any]) -> None:
        """Add what tokenizer_config.json names; of a token that several files name, the flags of the first count."""
        decoder = settings.get("added_tokens_decoder")
        if isinstance(decoder, Mapping):
            for index, entry in decoder.items():
                if isinstance(entry, Mapping):
                    self.add(TOKENIZER_CONFIG_NAME, index, entry.get("content"), entry)

    def add_names(self) -> None:
        """Add what added_tokens.json names, an older file without flags."""
        for content, index in _read_json(self.folder, ADDED_TOKENS_NAME).items():
            self.add(ADDED_TOKENS_NAME, index, content, {"special": False, "normalized": True})

    def add(self, name: str, index: object, content: object, flags: Mapping[str, Any]) -> None:
        """Note a token that a file names."""
        number = int(index) if isinstance(index, int | str) and str(index).isdecimal() else None
        if number is None or not isinstance(content, str) or not content:
            self.problems.append(f"{name}: token {shown(content)} of id {shown(index)}: must be a text and a number")
            return
        known = self._entries.setdefault(
            number, AddedToken(content, **{flag: flags[flag] for flag in _FLAGS if isinstance(flags.get(flag), bool)})
        )
        if known.content != content:
            self.problems.append(f"{name}: token {number} is {shown(content)}, and {shown(known.content)} elsewhere")

    def has(self, index: int, content: str) -> bool:
        """Whether a file names this token."""
        return index in self._entries and self._entries[index].content == content

    def check(self, pieces: Sequence[str | None]) -> None:
        """Find what is not as in the known vocabulary whose pieces these are."""
        ids: dict[str | None, int] = {piece: index for index, piece in enumerate(pieces[:VOCAB_SIZE])}
        for index, token in sorted(self._entries.items()):
            if index < VOCAB_SIZE:
                if pieces[index] != token.content:
                    self.problems.append(f"token {index} is {shown(token.content)}, its piece {shown(pieces[index])}")
                elif index not in CONTROL_IDS and index not in REFERENCE_IDS:
                    self.problems.append(f"the piece {shown(token.content)} of text was made a token of its own")
            elif token.content in ids:
                self.problems.append(f"added token {shown(token.content)} of id {index} is piece {ids[token.content]}")
        numbers = [index for index in sorted(self._entries) if index >= VOCAB_SIZE]
        if numbers != list(range(VOCAB_SIZE, VOCAB_SIZE + len(numbers))):
            self.problems.append(f"the ids of added tokens, {shown(numbers)}, have gaps")
        if len({self._entries[index].content for index in numbers}) != len(numbers):
            self.problems.append("two added tokens have one text")

    def tokens(self) -> tuple[AddedToken, ...]:
        """The tokens beyond the vocabulary, by id."""
        return tuple(token for index, token in sorted(self._entries.items()) if index >= VOCAB_SIZE)


def _pieces_of_json(folder: Path, entries: _Entries) -> list[str | None]:
    """The pieces that a tokenizer.json of any program has, by id; what was added to them goes to the entries."""
    content = _read_json(folder, TOKENIZER_JSON_NAME)
    for entry in content.get("added_tokens") or ():
        if isinstance(entry, Mapping):
            entries.add(TOKENIZER_JSON_NAME, entry.get("id"), entry.get("content"), entry)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocab, list):
        # Of a unigram: pieces with their scores.
        vocab = {entry[0]: index for index, entry in enumerate(vocab) if isinstance(entry, list) and entry}
    pieces: list[str | None] = [None] * VOCAB_SIZE
    for piece, index in (vocab if isinstance(vocab, Mapping) else {}).items():
        if type(index) is int and 0 <= index < VOCAB_SIZE:
            pieces[index] = piece
        elif not isinstance(piece, str) or type(index) is not int or index < 0 or not entries.has(index, piece):
            entries.problems.append(f"{TOKENIZER_JSON_NAME}: its model has a piece {shown(piece)} of id {shown(index)}")
            break
    return pieces


def _pieces_of_model(folder: Path, known: Path | None) -> tuple[str, list[str | None]]:
    """Name and pieces of a folder's SentencePiece file.

    Raises:
        TokenizerFileError: there is none, or it cannot be read.
    """
    path = known or next((folder / name for name in VOCABULARY_NAMES if (folder / name).exists()), None)
    if path is None:
        raise TokenizerFileError(
            f"{folder}: no tokenizer: neither {TOKENIZER_JSON_NAME} nor {', '.join(VOCABULARY_NAMES)}; download the "
            "tokenizer's files as well"
        )
    if problem := file_problem(folder, path.name):
        raise TokenizerFileError(f"{folder}: {problem}; download it again")
    return path.name, _sentencepiece_pieces(path)


def _sentencepiece_pieces(path: Path) -> list[str | None]:
    try:
        processor = load_processor(path)
    except (RuntimeError, OSError) as error:
        raise TokenizerFileError(f"{path}: not a SentencePiece model; download it again") from error
    return list(processor.id_to_piece(list(range(processor.get_piece_size()))))


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of a folder, empty if there is none.

    Raises:
        TokenizerFileError: a file that cannot be read.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return {}
    if problem := file_problem(folder, name):
        raise TokenizerFileError(f"{folder}: {problem}; download it again")
    try:
        return read_json_object(path)
    except (OSError, ValueError) as error:
        raise TokenizerFileError(f"{path}: {error}; download it again") from error


def _special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their names; tokenizer_config.json counts before special_tokens_map.json."""
    found: dict[str, str] = {}
    for content in (_read_json(folder, SPECIAL_TOKENS_NAME), settings):
        for name in SPECIAL_TOKENS:
            value = content.get(name)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str) and text:
                found[name] = text
    return found
