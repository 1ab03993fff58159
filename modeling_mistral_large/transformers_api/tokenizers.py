"""What transformers does with a tokenizer and with chat templates."""

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Lock
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import TokenizersBackend
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.generic import PaddingStrategy

from mistral_large_conversion.errors import MistralLargeError
from modeling_mistral_large.transformers_api.keywords import declared_options, refuse_unknown_options

# Options that transformers' own callers hand to every `apply_chat_template`, with the value that means nothing: its
# server does so with the sound of videos.
HOST_CHAT_OPTIONS: dict[str, Any] = {"load_audio_from_video": False}
# transformers keeps the spans of a rendered prompt in the compiled template, which threads share.
_RENDERER = Lock()


def render_chat_template(conversations: list[Any], template: str, **options: Any) -> tuple[list[str], list[Any]]:
    """Return rendered prompts and, with `return_assistant_tokens_mask`, the spans inside of `generation` tags.

    When it changes, prompts of chat templates that are not ours fail.
    """
    with _RENDERER:
        rendered: Any = render_jinja_template(conversations=conversations, chat_template=template, **options)
    texts, spans = rendered
    return list(texts), list(spans) or [()] * len(texts)


_ENCODE_OPTIONS = frozenset({*declared_options(TokenizersBackend._encode_plus)} - {"self"})


class TokenizerHook(TokenizersBackend):
    """What transformers does with a tokenizer by underscored names, handed to methods with names of ours.

    | hook | when it changes |
    | --- | --- |
    | `_tokenizer` | no tokenizer is made |
    | `_from_pretrained` | the vendor's file is read by transformers' own reader: other ids |
    | `_save_pretrained` | tokenizer.model.v3 is not saved |
    | `_add_tokens` | `encode_texts` does not see tokens that were added |
    | `_encode_plus` | misspelt options are swallowed; calls of several threads change each other's ids |
    | `_decode`, `_convert_encoding` | cut characters and offsets are transformers' |
    | `_get_padding_truncation_strategies` | padding and truncation of prompts fail |
    """

    @classmethod
    def read_files(cls, files: dict[str, Any], name: Any) -> dict[str, Any]:
        """Take the vocabulary's files out of those transformers has found, and return arguments of `__init__`."""
        raise NotImplementedError

    def save_more_files(self, folder: Path, prefix: str) -> tuple[str, ...]:
        """Write what transformers does not, and return the paths."""
        raise NotImplementedError

    def forget_tokens(self) -> None:
        """Drop what is derived from the tokens."""
        raise NotImplementedError

    def own_backend(self) -> Tokenizer:
        """Return a backend of the running thread, whose settings may be changed."""
        raise NotImplementedError

    def decoded(self, text: str, ids: list[int], skip_special_tokens: bool) -> str:
        """Return the text of ids, for which the backend gives `text`."""
        raise NotImplementedError

    def offsets(self, encoding: Encoding) -> list[tuple[int, int]]:
        """Return the offsets of an encoding."""
        raise NotImplementedError

    def set_backend(self, backend: Tokenizer) -> None:
        """Make a backend this tokenizer's, where the base class would copy one that is handed to it."""
        self._tokenizer = backend

    def strategies(
        self, padding: Any, truncation: Any, max_length: int | None, pad_to_multiple_of: int | None, verbose: bool
    ) -> tuple[PaddingStrategy, TruncationStrategy, Any]:
        """Return how to pad and to truncate, and to what length: an int, or None where neither is done."""
        read: Any = self._get_padding_truncation_strategies
        padding, truncation, max_length, _ = read(padding, truncation, max_length, pad_to_multiple_of, verbose)
        return padding, truncation, max_length

    def warn_of_length(self, ids: list[int], max_length: int | None, verbose: bool) -> None:
        """Say once that a sequence is longer than the model takes."""
        self._eventual_warn_about_too_long_sequence(ids, max_length, verbose)

    @classmethod
    def _from_pretrained(
        cls, resolved_vocab_files: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        name = pretrained_model_name_or_path
        read = cls.read_files(resolved_vocab_files, name)
        make: Any = super()._from_pretrained
        try:
            # What a caller passes has precedence over what the files say.
            return make(resolved_vocab_files, name, *args, **{**read, **kwargs})
        except OSError as error:
            # The base class words errors of files anew.
            if isinstance(error.__context__, MistralLargeError):
                raise error.__context__ from None
            raise

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        return (*files, *self.save_more_files(Path(save_directory), f"{filename_prefix}-" if filename_prefix else ""))

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        self.forget_tokens()
        return super()._add_tokens(new_tokens, special_tokens)

    def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
        refuse_unknown_options(type(self).__name__, kwargs, _ENCODE_OPTIONS)
        backend = self.backend_tokenizer
        splits = kwargs.get("split_special_tokens")
        if (
            kwargs.get("padding_strategy", PaddingStrategy.DO_NOT_PAD) == PaddingStrategy.DO_NOT_PAD
            and kwargs.get("truncation_strategy", TruncationStrategy.DO_NOT_TRUNCATE)
            == TruncationStrategy.DO_NOT_TRUNCATE
            and backend.encode_special_tokens == (self.split_special_tokens if splits is None else splits)
        ):
            return super()._encode_plus(*args, **kwargs)
        # transformers would set these on the backend that all threads share, and leave them set: in the middle of
        # another thread's call, and in the tokenizer's hash and its files.
        own = object.__new__(type(self))
        own.__dict__.update(self.__dict__, _tokenizer=self.own_backend())
        return super(TokenizerHook, own)._encode_plus(*args, **kwargs)

    def _convert_encoding(self, *args: Any, **kwargs: Any) -> Any:
        fields, encodings = super()._convert_encoding(*args, **kwargs)
        if "offset_mapping" in fields:
            fields["offset_mapping"] = [self.offsets(encoding) for encoding in encodings]
        return fields, encodings

    def _decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        refuse_unknown_options("decode", kwargs, ("skip_special_tokens", "clean_up_tokenization_spaces"))
        ids: list[int] = token_ids["input_ids"] if isinstance(token_ids, Mapping) else token_ids
        ids = [ids] if isinstance(ids, int) else ids
        text = super()._decode(ids, skip_special_tokens, clean_up_tokenization_spaces)
        return self.decoded(text, ids, skip_special_tokens)
