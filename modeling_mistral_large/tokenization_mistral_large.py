"""The tokenizer: SentencePiece's ids, prompts assembled from segments, answers parsed into messages."""

import inspect
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import BatchEncoding, TokenizersBackend
from transformers import __version__ as transformers_version
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy, to_py_obj

from .chat_templates import CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE, RESPONSE_TEMPLATE
from .errors import ConversationError, TokenizerFileError
from .instruct import Segment, build_prompt
from .sentencepiece_bpe import (
    BOS,
    CONTROL_IDS,
    CONTROL_TOKENS,
    EOS,
    RULE,
    UNKNOWN,
    VOCAB_SIZE,
    WAY_OUT,
    TextEncoder,
    join_pieces,
    load_sentencepiece_bpe,
    pre_tokenizer,
    read_tokenizer_json,
)
from .tool_calls import parse_answer

# A control piece without a meaning: it has its row in the embeddings, so nothing is resized, and it is not `</s>`,
# which collators would take out of the labels along with the padding. The vendor's later vocabularies give a meaning to
# such pieces from both ends (ids 14 to 18, 749 and 750); this one, id 384, is halfway.
PAD = "[control_382]"
MAX_LENGTH = 131072

# What `tokenizer_kwargs` can still say about a prompt that is put together from segments.
TOKENIZER_KWARGS = ("padding_side", "pad_to_multiple_of", "return_attention_mask", "verbose")


class MistralLargeTokenizer(TokenizersBackend):
    """The tokenizer of Mistral-Large-Instruct-2407, exact for every text and every conversation.

    vocab_file: `tokenizer.model.v3`.
    tokenizer_file: `tokenizer.json` as `save_pretrained` writes it; preferred, as it knows the tokens added since.

    Raises TokenizerFileError where there is neither, or what is there is another tokenizer.
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        # Not named vocab_file: without a tokenizer.json, transformers looks for `tokenizer.model.` under that name.
        "sentencepiece_file": "tokenizer.model.v3",
    }
    padding_side = "left"

    def __init__(self, vocab_file: str | None = None, tokenizer_file: str | None = None, **kwargs: Any) -> None:
        backend: Tokenizer = kwargs.pop("tokenizer_object", None) or _read_backend(tokenizer_file, vocab_file)
        # Set here because the base class would copy a backend that is handed to it.
        self._tokenizer = backend
        self._forget_added_tokens()
        # The backend has them; those in the config of another conversion would be added once more.
        kwargs.pop("added_tokens_decoder", None)
        wrapping = backend.encode("").ids
        defaults = {
            "bos_token": BOS,
            "eos_token": EOS,
            "unk_token": UNKNOWN,
            "pad_token": PAD,
            "model_max_length": MAX_LENGTH,
            "chat_template": CHAT_TEMPLATE,
            "response_template": RESPONSE_TEMPLATE,
            # The base class takes both for false, and would drop `<s>` as soon as one of them is set.
            "add_bos_token": backend.token_to_id(BOS) in wrapping,
            "add_eos_token": backend.token_to_id(EOS) in wrapping,
        }
        super().__init__(**{**defaults, **kwargs})  # type: ignore[no-untyped-call]
        self.vocab_file = vocab_file

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *init_inputs: Any, **kwargs: Any
    ) -> "MistralLargeTokenizer":
        """Read the tokenizer of a folder, of one of its two files, or of a repository on the hub."""
        path = Path(pretrained_model_name_or_path)
        # Imported here, because importing the package loads no more than stock Mistral does.
        from .consolidated_loading import find_tokenizer_file
        from .conversion.hub import is_repository_id, reachable_options

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
    def _from_pretrained(
        cls, resolved_vocab_files: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Any:
        # The backend is read here because the base class would parse tokenizer.json twice, and words an error of
        # `__init__` anew.
        tokenizer_file = resolved_vocab_files.pop("tokenizer_file", None)
        any_model_file = resolved_vocab_files.pop("vocab_file", None)
        vocab_file = resolved_vocab_files.pop("sentencepiece_file", None) or any_model_file
        if tokenizer_file is None and vocab_file is None:
            raise TokenizerFileError(
                f"{pretrained_model_name_or_path}: has neither tokenizer.model.v3 nor tokenizer.json; {RULE}; {WAY_OUT}"
            )
        return super()._from_pretrained(  # type: ignore[no-untyped-call]
            resolved_vocab_files,
            pretrained_model_name_or_path,
            *args,
            tokenizer_object=_read_backend(tokenizer_file, vocab_file),
            vocab_file=vocab_file,
            **kwargs,
        )

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the files alone, whose format the base class would guess from their names."""
        return kwargs

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        files = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if self.vocab_file is None or not Path(self.vocab_file).is_file():
            return files
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        copy = Path(save_directory) / f"{prefix}{self.vocab_files_names['sentencepiece_file']}"
        if not (copy.exists() and copy.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, copy)
        return (*files, str(copy))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_text_encoders": {}}

    def _forget_added_tokens(self) -> None:
        """Drop what is derived from the backend's tokens."""
        # With reference documents as pieces, and as text.
        self._text_encoders: dict[bool, Callable[[str], list[int]]] = {}
        self._pieces: list[str] | None = None

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        self._forget_added_tokens()
        return super()._add_tokens(new_tokens, special_tokens)

    @property
    def pieces(self) -> list[str]:
        """The pieces by id, as `tool_calls.AnswerStream` needs them to read ids."""
        if self._pieces is None:
            self._pieces = [self.backend_tokenizer.id_to_token(index) or "" for index in range(len(self))]
        return self._pieces

    def _convert_encoding(self, *args: Any, **kwargs: Any) -> Any:
        fields, encodings = super()._convert_encoding(*args, **kwargs)
        if "offset_mapping" in fields:
            # A ▁ of its own at the start of a text is the dummy: it stands for no character, not for the first.
            fields["offset_mapping"] = [
                [(0, 0) if token == "▁" and offset[0] == 0 else offset for token, offset in zip(*row, strict=True)]
                for row in ((encoding.tokens, encoding.offsets) for encoding in encodings)
            ]
        return fields, encodings

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        text = super().convert_tokens_to_string(tokens)
        return join_pieces(tokens) if "\ufffd" in text else text

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        text = super()._decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)
        if "\ufffd" not in text:
            return text
        # In a run of byte pieces with one that is wrong or still to come, the backend loses the good ones too.
        skipped = {i for i, token in self.added_tokens_decoder.items() if token.special} if skip_special_tokens else ()
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        return join_pieces(self.pieces[i] for i in ids if i < len(self.pieces) and i not in skipped)

    def encode_texts(self, texts: Sequence[str], *, reference_documents_as_text: bool = False) -> list[list[int]]:
        """Return the ids of texts that are not to be trusted: control strings stay text, and there is no `<s>`.

        `[REFERENCE_DOC_n]` in a text is one piece, as for SentencePiece, unless `reference_documents_as_text` is set.
        """
        encode = self._text_encoders.get(reference_documents_as_text)
        if encode is None:
            encode = _text_encoder(self.backend_tokenizer, reference_documents_as_text)
            self._text_encoders[reference_documents_as_text] = encode
        return [encode(text) for text in texts]

    def apply_chat_template(  # type: ignore[override, unused-ignore]
        self,
        conversation: Any,
        tools: Any = None,
        documents: Any = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        sanitize_control_tokens: bool = False,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: Any = None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the prompt of a conversation, or of a batch of them, as transformers' method of this name does.

        The ids are the reference's. Texts are encoded apart from control tokens, so `sanitize_control_tokens` has
        nothing left to do; the format has no generation prompt, so `add_generation_prompt` changes nothing.
        `strict=True` refuses what the reference refuses. `reference_documents_as_text=True` keeps the one kind of
        pieces from a text that the reference does take from it, `[REFERENCE_DOC_n]`, which has no meaning in this
        format. Another `chat_template` is left to transformers.

        Raises ConversationError with the message index, the finding, the rule and the way out.
        """
        if self.get_chat_template(chat_template, tools) not in (CHAT_TEMPLATE, PLAIN_CHAT_TEMPLATE):
            if sanitize_control_tokens:
                _check_sanitizer()
                kwargs["sanitize_control_tokens"] = True
            return super().apply_chat_template(
                conversation,
                tools=tools,
                documents=documents,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=tokenize,
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                tokenizer_kwargs=tokenizer_kwargs,
                **kwargs,
            )
        if add_generation_prompt and continue_final_message:
            raise ConversationError(
                "add_generation_prompt and continue_final_message: the answer to come is either new or the last "
                "message's rest; leave one of the two out"
            )
        if continue_final_message not in (False, True, "content"):
            raise ConversationError(
                f"continue_final_message={continue_final_message!r}: only 'content' can be continued; pass True"
            )
        if documents:
            raise ConversationError(
                "documents: the v3 format has no place for them; write them into a message or a tool's result"
            )
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("return_assistant_tokens_mask=True needs return_dict=True and tokenize=True")
        tokenizer_kwargs = tokenizer_kwargs or {}
        if unknown := [name for name in tokenizer_kwargs if name not in TOKENIZER_KWARGS]:
            raise ValueError(
                f"tokenizer_kwargs {unknown}: of a prompt only {', '.join(TOKENIZER_KWARGS)} can be chosen"
            )
        is_batch = _is_batch(conversation)
        prompts = [
            build_prompt(
                getattr(messages, "messages", messages),
                tools,
                continue_final_message=bool(continue_final_message),
                strict=kwargs.get("strict", False),
            )
            for messages in (conversation if is_batch else [conversation])
        ]
        if not tokenize:
            texts = ["".join(map(_render, prompt)) for prompt in prompts]
            return texts if is_batch else texts[0]
        encoding = self._encode_prompts(
            prompts,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            reference_documents_as_text=kwargs.get("reference_documents_as_text", False),
            **tokenizer_kwargs,
        )
        if is_batch or return_tensors is not None:
            output = BatchEncoding(encoding, tensor_type=return_tensors)
        else:
            output = BatchEncoding({name: rows[0] for name, rows in encoding.items()})
        return output if return_dict else output["input_ids"]

    def parse_response(
        self, response: Any, schema: dict[str, Any] | None = None, *, prefix: Any = None, tools: Any = None
    ) -> Any:
        """Return an answer as a message, or a batch of answers as messages, as transformers' method of this name does.

        response: text with its control tokens, or ids, which are exact; a list of texts or a second dimension of ids
            is a batch.
        schema: a response template; any but the bundled one is left to transformers.
        prefix: the prompt, or one for each answer. It matters only where the answer's ids continue a text in it.

        Raises nothing for any answer; `tool_calls.parse_answer` also says what could not be read, and why.
        """
        if (schema or self.response_template) != RESPONSE_TEMPLATE:
            return super().parse_response(response, schema, prefix=prefix, tools=tools)
        answers, is_batch = _as_batch(response)
        prefixes, _ = _as_batch("" if prefix is None else prefix)
        if len(prefixes) != len(answers):
            if len(prefixes) != 1:
                raise ValueError(f"{len(prefixes)} prefixes for {len(answers)} responses: pass one, or one for each")
            prefixes *= len(answers)
        messages = [
            parse_answer(answer, self.pieces, continues_text=_ends_in_text(prompt)).message
            for answer, prompt in zip(answers, prefixes, strict=True)
        ]
        return messages if is_batch else messages[0]

    def _encode_prompts(
        self,
        prompts: Sequence[Sequence[Segment]],
        *,
        padding: Any,
        truncation: Any,
        max_length: int | None,
        return_assistant_tokens_mask: bool,
        reference_documents_as_text: bool,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        verbose: bool = True,
    ) -> dict[str, list[list[int]]]:
        """Return ids and masks of prompts, one row each, truncated and padded as transformers does it."""
        texts = [part.text for prompt in prompts for part in prompt if not part.is_control]
        text_ids = iter(self.encode_texts(texts, reference_documents_as_text=reference_documents_as_text))
        part_ids = [
            [[CONTROL_TOKENS[part.text]] if part.is_control else next(text_ids) for part in prompt]
            for prompt in prompts
        ]
        padding, truncation, max_length, _ = self._get_padding_truncation_strategies(  # type: ignore[no-untyped-call]
            padding, truncation, max_length, pad_to_multiple_of, verbose
        )
        input_ids = [list(chain.from_iterable(parts)) for parts in part_ids]
        encoding = {"input_ids": input_ids}
        if return_attention_mask:
            encoding["attention_mask"] = [[1] * len(ids) for ids in input_ids]
        if return_assistant_tokens_mask:
            encoding["assistant_masks"] = [
                [int(part.is_generated) for part, ids in zip(prompt, parts, strict=True) for _ in ids]
                for prompt, parts in zip(prompts, part_ids, strict=True)
            ]
        if truncation != TruncationStrategy.DO_NOT_TRUNCATE:
            is_right = self.truncation_side == "right"
            kept = [slice(max_length) if is_right else slice(max(len(ids) - max_length, 0), None) for ids in input_ids]
            encoding = {
                name: [row[part] for row, part in zip(rows, kept, strict=True)] for name, rows in encoding.items()
            }
        for ids in encoding["input_ids"]:
            self._eventual_warn_about_too_long_sequence(ids, max_length, verbose)
        if padding != PaddingStrategy.DO_NOT_PAD:
            length = max_length if padding == PaddingStrategy.MAX_LENGTH else max(map(len, encoding["input_ids"]))
            length += -length % (pad_to_multiple_of or 1)
            is_left = (padding_side or self.padding_side) == "left"
            for name, rows in encoding.items():
                filler = self.pad_token_id if name == "input_ids" else 0
                pads = [[filler] * (length - len(row)) for row in rows]
                encoding[name] = [pad + row if is_left else row + pad for row, pad in zip(rows, pads, strict=True)]
        return encoding


def _read_backend(tokenizer_file: str | None, vocab_file: str | None) -> Tokenizer:
    if tokenizer_file is not None:
        try:
            return read_tokenizer_json(tokenizer_file)
        except TokenizerFileError:
            # Beside tokenizer.model.v3 the vendor publishes a tokenizer.json that is not exact.
            if vocab_file is None:
                raise
    if vocab_file is None:
        raise TokenizerFileError(f"neither vocab_file nor tokenizer_file is given; {RULE}; {WAY_OUT}")
    return load_sentencepiece_bpe(vocab_file)


def _text_encoder(backend: Tokenizer, reference_documents_as_text: bool) -> Callable[[str], list[int]]:
    """Return what encodes a text on the same model, takes special tokens for text, and knows the tokens added since."""
    added = _added_tokens(backend)
    if not added:
        return TextEncoder(backend, reference_documents_as_text=reference_documents_as_text)
    text_backend = Tokenizer(backend.model)
    text_backend.pre_tokenizer = pre_tokenizer(reference_documents_as_text=reference_documents_as_text)
    text_backend.encode_special_tokens = True
    text_backend.add_tokens(added)
    return lambda text: text_backend.encode(text, add_special_tokens=False).ids


def _added_tokens(backend: Tokenizer) -> list[AddedToken]:
    """The tokens beyond the vendor's vocabulary, in the order of their ids."""
    return [token for index, token in sorted(backend.get_added_tokens_decoder().items()) if index >= VOCAB_SIZE]


def _is_batch(conversation: Any) -> bool:
    if not isinstance(conversation, list | tuple) or not conversation:
        return False
    return isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")


def _as_batch(sequences: Any) -> tuple[list[Any], bool]:
    """Return texts or lists of ids, and whether there may be more than one."""
    if isinstance(sequences, str):
        return [sequences], False
    sequences = to_py_obj(sequences)  # type: ignore[no-untyped-call]
    if sequences and isinstance(sequences[0], str | list | tuple):
        return list(sequences), True
    return [sequences], False


def _ends_in_text(prompt: str | Sequence[int]) -> bool:
    if isinstance(prompt, str):
        return bool(prompt) and not prompt.endswith(tuple(CONTROL_TOKENS))
    return bool(prompt) and prompt[-1] not in CONTROL_IDS


def _render(part: Segment) -> str:
    """Return a segment as a rendered prompt writes it: a text, unless it is empty, after the space its dummy ▁ is."""
    return part.text if part.is_control or not part.text else f" {part.text}"


def _check_sanitizer() -> None:
    # Versions that do not know the option would take it for a variable of the template.
    if "sanitize_control_tokens" not in inspect.signature(TokenizersBackend.apply_chat_template).parameters:
        raise ValueError(
            f"sanitize_control_tokens: transformers {transformers_version} cannot do it for this chat_template; "
            "leave chat_template out, or upgrade transformers"
        )
