"""The tokenizer: SentencePiece's ids, read from either of its files and saved to both."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer

from mistral_large_conversion.chat_templates import CHAT_TEMPLATES, RESPONSE_TEMPLATES, prompt_format_of
from mistral_large_conversion.checkpoint.remote_code import TOKENIZER_AUTO_MAP
from mistral_large_conversion.errors import TokenizerFileError
from mistral_large_conversion.sentencepiece_bpe import (
    RULE,
    WAY_OUT,
    TextEncoder,
    added_tokens,
    check_backend,
    clone_backend,
    load_sentencepiece_bpe,
    read_tokenizer_json,
    vocabulary_of,
)
from mistral_large_conversion.vocabulary import (
    BOS,
    BYTE_IDS,
    EOS,
    MAX_LENGTH,
    PAD,
    UNKNOWN,
    VOCABULARIES,
    Vocabulary,
    join_pieces,
    known_vocabulary,
)
from modeling_mistral_large.chat_tokenization import ChatTokenizer, TokenizerCaches
from modeling_mistral_large.errors import KeywordError, UnknownVocabularyError
from modeling_mistral_large.instruct.formats import format_problem
from modeling_mistral_large.instruct.json_text import show
from modeling_mistral_large.remote_code import write_remote_code

SPACE_BYTE = "<0x20>"
# Settings of other tokenizers, with the one value that this one has. Values of files, by other programs, say how their
# tokenizer was; a caller's would have no effect.
FIXED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "add_prefix_space": (True, None),
    "legacy": (False, None),
    "sp_model_kwargs": ({}, None),
    "fix_mistral_regex": (False, None),
    "use_default_system_prompt": (False, None),
    "spaces_between_special_tokens": (False, None),
    "dropout": (None, 0, 0.0),
    **dict.fromkeys(("vocab", "merges", "normalizer", "pre_tokenizer", "decoder", "post_processor"), (None,)),
    **dict.fromkeys(("tokenizer_truncation", "tokenizer_padding", "gguf_file"), (None,)),
}
SETTINGS = (
    *FIXED_SETTINGS,
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("extra_special_tokens", "additional_special_tokens", "add_bos_token", "add_eos_token", "split_special_tokens"),
    *("padding_side", "truncation_side", "model_max_length", "max_length", "model_input_names"),
    *("clean_up_tokenization_spaces", "chat_template", "response_template", "chat_control_tokens", "prompt_format"),
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "code_revision", "subfolder"),
    *("trust_remote_code", "use_fast", "from_slow", "tokenizer_file", "vocab_file", "tokenizer_type"),
)


class MistralLargeTokenizer(ChatTokenizer):
    """The tokenizer of Mistral-Large-Instruct-2407 and 2411, exact for every text and every conversation.

    vocab_file: `tokenizer.model.v3` or `tokenizer.model.v7`.
    tokenizer_file: `tokenizer.json` as `save_pretrained` writes it; preferred, as it knows the tokens added since.
    prompt_format: `v3` or `v7`, the format of the bundled chat template that is used where none is given; by default
        that of the vocabulary. The control tokens of v7 exist in its own vocabulary only, those of v3 in both.

    Raises TokenizerFileError where there is neither file, what is there is another tokenizer, or its vocabulary lacks
    control tokens of the format; KeywordError for a setting that this tokenizer does not have.
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        # Not named vocab_file: without a tokenizer.json, transformers looks for `tokenizer.model.` under that name.
        **{f"sentencepiece_{name}_file": each.file_name for name, each in VOCABULARIES.items()},
    }
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        *,
        prompt_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        # Of `read_files`: then the settings are a file's as well, and about the tokenizer of the program that wrote it.
        backend: Tokenizer | None = kwargs.pop("read_backend", None)
        given: Tokenizer | None = kwargs.pop("tokenizer_object", None)
        if backend is None:
            _refuse_settings(kwargs)
            if given is not None:
                check_backend(given, "tokenizer_object")
            backend = _read_backend(tokenizer_file, vocab_file) if given is None else deepcopy(given)
        elif kwargs.get("add_prefix_space") is False:
            warnings.warn(
                f"{kwargs.get('name_or_path')}: tokenizer_config.json says add_prefix_space false; this tokenizer has "
                "a ▁ before every text, as the vendor's has",
                stacklevel=2,
            )
        vocabulary = vocabulary_of(backend)
        if prompt_format not in (None, *CHAT_TEMPLATES):
            raise TokenizerFileError(
                f"prompt_format {show(prompt_format)} in tokenizer_config.json: this version of the package makes "
                f"{' and '.join(CHAT_TEMPLATES)} prompts only; use the version that wrote it"
            )
        if problem := format_problem(prompt_format, vocabulary):
            raise TokenizerFileError(f"prompt_format {show(prompt_format)}: {problem}")
        bundled = prompt_format or vocabulary.name
        # Calls have settings of their own; those saved with them by others would be in every file again.
        backend.no_truncation()
        backend.no_padding()
        self._caches = TokenizerCaches()
        self.set_backend(backend)
        for name in FIXED_SETTINGS:
            kwargs.pop(name, None)
        # The backend has them; those in the config of another conversion would be added once more.
        kwargs.pop("added_tokens_decoder", None)
        wrapping = backend.encode("").ids
        defaults = {
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": UNKNOWN,
            "pad_token": PAD,
            "model_max_length": MAX_LENGTH,
            "chat_template": CHAT_TEMPLATES[bundled],
            "response_template": RESPONSE_TEMPLATES[bundled],
            # The base class takes both for false, and would drop `<s>` as soon as one of them is set.
            "add_bos_token": backend.token_to_id(BOS) in wrapping,
            "add_eos_token": backend.token_to_id(EOS) in wrapping,
            "add_prefix_space": True,
        }
        # Whatever a file says, so that no other module is named when the tokenizer is saved again.
        kwargs["auto_map"] = TOKENIZER_AUTO_MAP
        super().__init__(**{**defaults, **kwargs})  # type: ignore[no-untyped-call]
        self.vocab_file = vocab_file
        del self.init_kwargs["add_prefix_space"]
        # What is saved is the property's value.
        self.init_kwargs["prompt_format"] = prompt_format

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> "MistralLargeTokenizer":
        """Read the tokenizer of a folder, of one of its two files, or of a repository on the hub.

        prompt_format: `v3` or `v7` for the bundled templates of that format instead of the folder's own.
        """
        _refuse_settings(kwargs)
        _choose_templates(kwargs)
        path = Path(pretrained_model_name_or_path)
        # Imported here, because importing the package loads no more than stock Mistral does.
        from mistral_large_conversion.checkpoint.hub import is_repository_id, reachable_options
        from modeling_mistral_large.adapter_loading import find_tokenizer_file

        # The base class would take it for the name of a repository, and speak of that.
        if not path.exists() and not is_repository_id(os.fspath(pretrained_model_name_or_path)):
            raise TokenizerFileError(f"{path}: no such file or folder; {RULE}; {WAY_OUT}")
        kwargs = reachable_options(pretrained_model_name_or_path, kwargs)
        if path.exists():
            # The base class would ask the hub for the templates of a repository with the name of the file.
            kwargs["local_files_only"] = True
        alone = find_tokenizer_file(pretrained_model_name_or_path, kwargs)
        if alone is not None:
            kwargs.pop("subfolder", None)
        tokenizer: MistralLargeTokenizer = super().from_pretrained(
            alone or pretrained_model_name_or_path, *init_inputs, **kwargs
        )
        tokenizer.name_or_path = str(pretrained_model_name_or_path)
        return tokenizer

    @classmethod
    def read_files(cls, files: dict[str, Any], name: Any) -> dict[str, Any]:
        """Take the vocabulary's files out of those transformers has found, and return arguments of `__init__`.

        The backend is read here because the base class would parse tokenizer.json twice, and words an error of
        `__init__` anew.
        """
        tokenizer_file = files.pop("tokenizer_file", None)
        any_model_file = files.pop("vocab_file", None)
        own = [files.pop(f"sentencepiece_{vocabulary}_file", None) for vocabulary in VOCABULARIES]
        vocab_file = next(filter(None, own), any_model_file)
        if tokenizer_file is None and vocab_file is None:
            names = ", ".join(vocabulary.file_name for vocabulary in VOCABULARIES.values())
            raise TokenizerFileError(f"{name}: has none of {names} and tokenizer.json; {RULE}; {WAY_OUT}")
        if (exact := _read_exact(tokenizer_file)) is not None:
            return {"read_backend": _agreeing(exact, vocab_file), "vocab_file": vocab_file}
        if Path(name).is_file():
            return {"read_backend": _read_backend(tokenizer_file, vocab_file), "vocab_file": vocab_file}
        # Imported here, because it imports what only such folders need.
        from modeling_mistral_large.foreign_tokenizer import read_foreign_tokenizer

        is_known = tokenizer_file is not None or known_vocabulary(vocab_file) is not None
        # Pieces alone do not make a SentencePiece file: scores, types and settings decide about ids as well.
        read = read_foreign_tokenizer(Path(tokenizer_file or vocab_file).parent, name) if is_known else None
        if read is None:
            raise _unknown_vocabulary(tokenizer_file, vocab_file, name)
        return read

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the files alone, whose format the base class would guess from their names."""
        return kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: transformers would copy the source of this package into folders, instead of the module."""

    def save_more_files(self, folder: Path, prefix: str) -> tuple[str, ...]:
        """Write the module that the files name and, if it is at hand and the vendor's, its SentencePiece file."""
        module = write_remote_code(folder)
        if self.vocab_file is None or known_vocabulary(self.vocab_file) is None:
            return (module,)
        copy = folder / f"{prefix}{self.vocabulary.file_name}"
        if not (copy.exists() and copy.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, copy)
        return (module, str(copy))

    def __getstate__(self) -> dict[str, Any]:
        # Without what a call has said already: the hash of a tokenizer does not change by its use.
        return {**self.__dict__, "deprecation_warnings": {}}

    @property
    def add_prefix_space(self) -> bool:
        """Whether there is a ▁ before every text: always."""
        return True

    @add_prefix_space.setter
    def add_prefix_space(self, value: bool | None) -> None:
        _refuse_settings({"add_prefix_space": value})

    @property
    def prompt_format(self) -> str | None:
        """The format of the prompts of this tokenizer's chat template: `v3`, `v7`, or None for another template."""
        template = self.chat_template
        return prompt_format_of(template.get("default") if isinstance(template, dict) else template)

    @property
    def vocabulary(self) -> Vocabulary:
        """The vendor's vocabulary that this tokenizer has, without tokens that were added since."""
        return vocabulary_of(self.backend_tokenizer)

    def forget_tokens(self) -> None:
        self._caches.forget_tokens()

    def own_backend(self) -> Tokenizer:
        of_thread = self._caches.of_thread
        if not hasattr(of_thread, "backend"):
            of_thread.backend = clone_backend(self.backend_tokenizer)
        backend: Tokenizer = of_thread.backend
        # Set by `add_bos_token` and its like.
        backend.post_processor = self.backend_tokenizer.post_processor
        return backend

    @property
    def pieces(self) -> list[str]:
        """The pieces by id, as `tool_calls.AnswerStream` needs them to read ids."""
        if self._caches.pieces is None:
            self._caches.pieces = [self.backend_tokenizer.id_to_token(index) or "" for index in range(len(self))]
        return self._caches.pieces

    def offsets(self, encoding: Encoding) -> list[tuple[int, int]]:
        """Return the offsets of an encoding: a ▁ of its own at the start is the dummy and stands for no character."""
        return [
            (0, 0) if token == "▁" and offset[0] == 0 else offset
            for token, offset in zip(encoding.tokens, encoding.offsets, strict=True)
        ]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = super().convert_tokens_to_string(tokens)
        return join_pieces(tokens) if "\ufffd" in text or tokens[:1] == [SPACE_BYTE] else text

    def decoded(self, text: str, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of ids, for which the backend gives `text`.

        In a run of byte pieces with one that is wrong or still to come the backend loses the good ones too, and the
        space of a first byte piece it takes for the dummy's.
        """
        space = BYTE_IDS[ord(" ")]
        if "\ufffd" not in text and space not in ids:
            return text
        skipped = {i for i, token in self.added_tokens_decoder.items() if token.special} if skip_special_tokens else ()
        kept = [i for i in ids if i < len(self.pieces) and i not in skipped]
        return join_pieces(self.pieces[i] for i in kept) if "\ufffd" in text or kept[:1] == [space] else text

    def encode_texts(self, texts: Sequence[str], *, reference_documents_as_text: bool = False) -> list[list[int]]:
        """Return the ids of texts that are not to be trusted: control strings stay text, and there is no `<s>`.

        `[REFERENCE_DOC_n]` in a text is one piece, as for SentencePiece, and in the v7 vocabulary so are `[REF]` and
        `[/REF]`, unless `reference_documents_as_text` is set.
        """
        # Another thread may forget them meanwhile.
        encoders, key = self._caches.text_encoders, reference_documents_as_text
        encode = encoders.get(key) or _text_encoder(self.backend_tokenizer, key)
        encoders[key] = encode
        return [encode(text) for text in texts]


def _read_exact(tokenizer_file: str | None) -> Tokenizer | None:
    """Return the exact backend of a tokenizer.json, as this package writes it, or None where it is another one."""
    try:
        return None if tokenizer_file is None else read_tokenizer_json(tokenizer_file)
    except TokenizerFileError:
        return None


def _unknown_vocabulary(tokenizer_file: str | None, vocab_file: str | None, name: Any) -> UnknownVocabularyError:
    """Return the error for a folder whose vocabulary is none of the vendor's, with what tells it apart."""
    try:
        _read_backend(tokenizer_file, None if tokenizer_file else vocab_file)
    except TokenizerFileError as error:
        return UnknownVocabularyError(
            f"{error}; modeling_mistral_large.load({str(name)!r}) takes transformers' own tokenizer for such a folder"
        )
    raise AssertionError("a known vocabulary is read before")


def _read_backend(tokenizer_file: str | None, vocab_file: str | None) -> Tokenizer:
    if tokenizer_file is not None:
        try:
            backend = read_tokenizer_json(tokenizer_file)
        except TokenizerFileError:
            # Next to its SentencePiece file the vendor publishes a tokenizer.json that is not exact.
            if vocab_file is None:
                raise
        else:
            return _agreeing(backend, vocab_file)
    if vocab_file is None:
        raise TokenizerFileError(f"neither vocab_file nor tokenizer_file is given; {RULE}; {WAY_OUT}")
    return load_sentencepiece_bpe(vocab_file)


def _agreeing(backend: Tokenizer, vocab_file: str | None) -> Tokenizer:
    """Return the backend of a tokenizer.json, which the SentencePiece file next to it must agree with."""
    if vocab_file is not None and known_vocabulary(vocab_file) != vocabulary_of(backend).name:
        raise TokenizerFileError(
            f"{vocab_file}: other pieces, scores, types or settings than the vendor's file, which "
            f"tokenizer.json next to it was made of; {RULE}; download it again, or remove it"
        )
    return backend


def _text_encoder(backend: Tokenizer, reference_documents_as_text: bool) -> Callable[[str], list[int]]:
    """Return what encodes a text on the same model, takes special tokens for text, and knows the tokens added since."""
    added: list[AddedToken] = [token for _, token in added_tokens(backend)]
    if not added:
        return TextEncoder(backend, reference_documents_as_text=reference_documents_as_text)
    text_backend = clone_backend(backend, added=added, reference_documents_as_text=reference_documents_as_text)
    text_backend.encode_special_tokens = True
    return lambda text: text_backend.encode(text, add_special_tokens=False).ids


def _choose_templates(settings: dict[str, Any]) -> None:
    """Add the templates of the prompt format that a caller passes, or raise KeywordError."""
    if (chosen := settings.get("prompt_format")) is None:
        return
    if chosen not in CHAT_TEMPLATES:
        raise KeywordError(
            f"prompt_format={show(chosen)}: the prompt formats are {', '.join(CHAT_TEMPLATES)}; choose one, or leave "
            "prompt_format out"
        )
    if settings.get("chat_template") is None:
        settings["chat_template"] = CHAT_TEMPLATES[chosen]
    elif prompt_format_of(settings["chat_template"]) != chosen:
        raise KeywordError(
            f"prompt_format={show(chosen)}: the chat_template that is passed is another one and decides about prompts; "
            "leave one of the two out"
        )
    if settings.get("response_template") is None:
        settings["response_template"] = RESPONSE_TEMPLATES[chosen]


def _refuse_settings(settings: Mapping[str, Any]) -> None:
    """Raise KeywordError for a setting that a caller passes and this tokenizer does not have."""
    for name, values in FIXED_SETTINGS.items():
        if name in settings and not any(settings[name] is value or settings[name] == value for value in values):
            raise KeywordError(
                f"{name}={show(settings[name])}: this tokenizer encodes as the vendor's SentencePiece model does, "
                f"for which it is {show(values[0])}; leave {name} out"
            )
    for name in settings:
        # Callers hand all kinds of names through, which transformers keeps and does not read: only misspelt ones are
        # refused.
        close = get_close_matches(name, SETTINGS, n=1, cutoff=0.85)
        if name not in SETTINGS and close:
            raise KeywordError(f"{name}: no setting of a tokenizer; did you mean {close[0]!r}?")
