"""The tokenizer: SentencePiece's ids, prompts assembled from segments, answers parsed into messages."""

import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from threading import local
from typing import Any

from tokenizers import AddedToken, Encoding, Tokenizer
from transformers import BatchEncoding
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy, to_py_obj

from mistral_large_conversion.chat_templates import (
    CHAT_TEMPLATE,
    PROMPT_FORMAT,
    RESPONSE_TEMPLATE,
    prompt_format_of,
    response_format_of,
)
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
)
from mistral_large_conversion.vocabulary import (
    BOS,
    BYTE_IDS,
    CONTROL_IDS,
    CONTROL_TOKENS,
    EOS,
    MAX_LENGTH,
    PAD,
    UNKNOWN,
    join_pieces,
    known_vocabulary,
)
from modeling_mistral_large.custom_templates import CustomPrompts, template_variables
from modeling_mistral_large.errors import ConversationError, KeywordError
from modeling_mistral_large.instruct.answer import parse_answer
from modeling_mistral_large.instruct.json_text import show
from modeling_mistral_large.instruct.prompt import Segment, build_prompt
from modeling_mistral_large.remote_code import write_remote_code
from modeling_mistral_large.transformers_api import HOST_CHAT_OPTIONS, TokenizerHook, refuse_unknown_options

# A control piece without a meaning: it has its row in the embeddings, so nothing is resized, and it is not `</s>`,
# which collators would take out of the labels along with the padding. The vendor's later vocabularies give a meaning to

# What `tokenizer_kwargs` can still say about a prompt that is put together from segments.
TOKENIZER_KWARGS = ("padding_side", "pad_to_multiple_of", "return_attention_mask", "verbose")


# Options of `apply_chat_template` in every version of transformers.
_CHAT_OPTIONS = (
    *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
# Our options of `apply_chat_template`, which no other template can keep to.
FORMAT_OPTIONS = ("strict", "finetuning", "reference_documents_as_text")
SPACE_BYTE = "<0x20>"
# Templates that are none of ours whose encoders are remembered.
MOST_TEMPLATES = 8

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


class CustomTemplateWarning(UserWarning):
    """A chat or response template that is not ours: what it gives is the template's, not the reference's."""


class _Caches:
    """What a tokenizer remembers. It is no part of its state: copies and pickles have an empty one."""

    def __init__(self) -> None:
        self.said: set[tuple[str, int]] = set()
        self.forget_tokens()

    def forget_tokens(self) -> None:
        """Drop what is derived from the backend's tokens."""
        # With reference documents as pieces, and as text.
        self.text_encoders: dict[bool, Callable[[str], list[int]]] = {}
        self.custom_prompts: dict[tuple[str, tuple[str, ...]], CustomPrompts] = {}
        self.pieces: list[str] | None = None
        self.of_thread = local()

    def __reduce__(self) -> tuple[type["_Caches"], tuple[()]]:
        return _Caches, ()


class MistralLargeTokenizer(TokenizerHook):
    """The tokenizer of Mistral-Large-Instruct-2407, exact for every text and every conversation.

    vocab_file: `tokenizer.model.v3`.
    tokenizer_file: `tokenizer.json` as `save_pretrained` writes it; preferred, as it knows the tokens added since.
    prompt_format: what a folder records about its chat template; only `v3` can be read.

    Raises TokenizerFileError where there is neither, or what is there is another tokenizer; KeywordError for a setting
    that this tokenizer does not have.
    """

    vocab_files_names = {
        "tokenizer_file": "tokenizer.json",
        # Not named vocab_file: without a tokenizer.json, transformers looks for `tokenizer.model.` under that name.
        "sentencepiece_file": "tokenizer.model.v3",
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
        if prompt_format not in (None, PROMPT_FORMAT):
            raise TokenizerFileError(
                f"prompt_format {show(prompt_format)} in tokenizer_config.json: this version of the package makes "
                f"{PROMPT_FORMAT} prompts only; use the version that wrote it"
            )
        # Calls have settings of their own; those saved with them by others would be in every file again.
        backend.no_truncation()
        backend.no_padding()
        self._caches = _Caches()
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
            "chat_template": CHAT_TEMPLATE,
            "response_template": RESPONSE_TEMPLATE,
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
        """Read the tokenizer of a folder, of one of its two files, or of a repository on the hub."""
        _refuse_settings(kwargs)
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
        vocab_file = files.pop("sentencepiece_file", None) or any_model_file
        if tokenizer_file is None and vocab_file is None:
            raise TokenizerFileError(f"{name}: has neither tokenizer.model.v3 nor tokenizer.json; {RULE}; {WAY_OUT}")
        return {"read_backend": _read_backend(tokenizer_file, vocab_file), "vocab_file": vocab_file}

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the files alone, whose format the base class would guess from their names."""
        return kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Do nothing: transformers would copy the source of this package into folders, instead of the module."""

    def save_more_files(self, folder: Path, prefix: str) -> tuple[str, ...]:
        """Write the module that the files name and, if it is at hand and the vendor's, tokenizer.model.v3."""
        module = write_remote_code(folder)
        if self.vocab_file is None or known_vocabulary(self.vocab_file) is None:
            return (module,)
        copy = folder / f"{prefix}{self.vocab_files_names['sentencepiece_file']}"
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
        """The format of the prompts of this tokenizer's chat template: `v3`, or None where it is another template."""
        template = self.chat_template
        return prompt_format_of(template.get("default") if isinstance(template, dict) else template)

    def forget_tokens(self) -> None:
        """Drop what is derived from the tokens."""
        self._caches.forget_tokens()

    def own_backend(self) -> Tokenizer:
        """Return a backend of the running thread, whose settings may be changed."""
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

        `[REFERENCE_DOC_n]` in a text is one piece, as for SentencePiece, unless `reference_documents_as_text` is set.
        """
        encoders = self._caches.text_encoders
        encode = encoders.get(reference_documents_as_text)
        if encode is None:
            encode = _text_encoder(self.backend_tokenizer, reference_documents_as_text)
            encoders[reference_documents_as_text] = encode
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
        sanitize_control_tokens: bool | None = None,
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
        `strict=True` refuses what the reference refuses, `finetuning=True` what its fine-tuning mode refuses in a
        training sample. `reference_documents_as_text=True` keeps the one kind of pieces from a text that the reference
        does take from it, `[REFERENCE_DOC_n]`, which has no meaning in this format.

        A `chat_template` that is none of ours, passed or set, is rendered by transformers, and a CustomTemplateWarning
        says so once. Control strings in texts stay text all the same, unless `sanitize_control_tokens` is False. Other
        keywords are variables of such a template.

        Raises ConversationError with the message index, the finding, the rule and the way out; KeywordError for a
        keyword that neither this method nor the template takes.
        """
        template = self.get_chat_template(chat_template, tools)
        if add_generation_prompt and continue_final_message:
            raise ConversationError(
                "add_generation_prompt and continue_final_message: the answer to come is either new or the last "
                "message's rest; leave one of the two out"
            )
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "return_assistant_tokens_mask": return_assistant_tokens_mask,
        }
        kwargs = {
            name: value
            for name, value in kwargs.items()
            if not (name in HOST_CHAT_OPTIONS and value == HOST_CHAT_OPTIONS[name])
        }
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("return_assistant_tokens_mask=True needs return_dict=True and tokenize=True")
        tokenizer_kwargs = tokenizer_kwargs or {}
        if unknown := [name for name in tokenizer_kwargs if name not in TOKENIZER_KWARGS]:
            raise ValueError(
                f"tokenizer_kwargs {unknown}: of a prompt only {', '.join(TOKENIZER_KWARGS)} can be chosen"
            )
        is_batch = _is_batch(conversation)
        conversations = list(conversation) if is_batch else [conversation]
        if prompt_format_of(template) is None:
            is_safe = sanitize_control_tokens is not False
            self._say_custom(chat_template, template, is_safe=is_safe)
            rows = self._custom_prompts(
                template,
                conversations,
                tools=tools,
                documents=documents,
                tokenize=tokenize,
                is_safe=is_safe,
                variables=kwargs,
                **options,
            )
        else:
            rows = self._own_prompts(
                conversations, tools=tools, documents=documents, tokenize=tokenize, **options, **kwargs
            )
        if not tokenize:
            return rows if is_batch else rows[0]
        encoding = self._as_encoding(
            rows,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            **tokenizer_kwargs,
        )
        if is_batch or return_tensors is not None:
            output = BatchEncoding(encoding, tensor_type=return_tensors)
        else:
            output = BatchEncoding({name: rows[0] for name, rows in encoding.items()})
        return output if return_dict else output["input_ids"]

    def _own_prompts(
        self,
        conversations: Sequence[Any],
        *,
        tools: Any,
        documents: Any,
        tokenize: bool,
        add_generation_prompt: bool,
        continue_final_message: bool | str,
        return_assistant_tokens_mask: bool,
        strict: bool = False,
        finetuning: bool = False,
        reference_documents_as_text: bool = False,
        **unknown: Any,
    ) -> list[Any]:
        """Return prompts of the v3 format, as text or as ids and marks of what the assistant says."""
        refuse_unknown_options("apply_chat_template", unknown, (*_CHAT_OPTIONS, *FORMAT_OPTIONS))
        if continue_final_message not in (False, True, "content"):
            raise ConversationError(
                f"continue_final_message={continue_final_message!r}: only 'content' can be continued; pass True"
            )
        if documents:
            raise ConversationError(
                "documents: the v3 format has no place for them; write them into a message or a tool's result"
            )
        prompts = [
            build_prompt(
                messages,
                tools,
                continue_final_message=bool(continue_final_message),
                strict=strict,
                finetuning=finetuning,
            )
            for messages in conversations
        ]
        if not tokenize:
            return ["".join(map(_render, prompt)) for prompt in prompts]
        texts = [part.text for prompt in prompts for part in prompt if not part.is_control]
        text_ids = iter(self.encode_texts(texts, reference_documents_as_text=reference_documents_as_text))
        part_ids = [
            [[CONTROL_TOKENS[part.text]] if part.is_control else next(text_ids) for part in prompt]
            for prompt in prompts
        ]
        masks = [
            [int(part.is_generated) for part, ids in zip(prompt, parts, strict=True) for _ in ids]
            if return_assistant_tokens_mask
            else []
            for prompt, parts in zip(prompts, part_ids, strict=True)
        ]
        return [(list(chain.from_iterable(parts)), mask) for parts, mask in zip(part_ids, masks, strict=True)]

    def _custom_prompts(
        self,
        template: str,
        conversations: Sequence[Any],
        *,
        tokenize: bool,
        is_safe: bool,
        variables: Mapping[str, Any],
        **options: Any,
    ) -> list[Any]:
        """Return prompts of a template that is not ours, as text or as ids and marks of what the assistant says."""
        if refused := [name for name in FORMAT_OPTIONS if variables.get(name)]:
            raise ConversationError(
                f"{refused[0]}=True: the chat template is none of ours, so it cannot be held to the reference; "
                f"leave {refused[0]} out, or use our template"
            )
        if options["continue_final_message"] and options["return_assistant_tokens_mask"]:
            raise ConversationError("continue_final_message and return_assistant_tokens_mask: leave one of the two out")
        variables = {name: value for name, value in variables.items() if name not in FORMAT_OPTIONS}
        refuse_unknown_options("apply_chat_template", variables, (*_CHAT_OPTIONS, *template_variables(template)))
        # An attribute of the newer versions of transformers.
        named = tuple(getattr(self, "chat_control_tokens", None) or ())
        cached = self._caches.custom_prompts
        prompts = cached.get((template, named))
        if prompts is None:
            if len(cached) >= MOST_TEMPLATES:
                cached.clear()
            prompts = cached[template, named] = CustomPrompts(template, self.backend_tokenizer, control_tokens=named)
        texts, spans, characters = prompts.render(
            conversations, variables=variables, own_variables=self.special_tokens_map, is_safe=is_safe, **options
        )
        if not tokenize:
            return [text.translate(characters) for text in texts]
        return [prompts.encode(text, span, characters) for text, span in zip(texts, spans, strict=True)]

    def _say_custom(self, chat_template: str | None, template: str, *, is_safe: bool) -> None:
        if chat_template is not None and prompt_format_of(chat_template) is None:
            named = isinstance(self.chat_template, dict) and chat_template in self.chat_template
            source = f"the chat template {chat_template!r}" if named else "the chat_template that is passed"
        else:
            source = f"the chat template of {self.name_or_path or 'this tokenizer'}"
        recorded = self.init_kwargs.get("prompt_format")
        self._say_once(
            "chat_template",
            template,
            f"{source} is none of this package's{f', though {recorded} is recorded with it' if recorded else ''}: "
            "prompts are what it renders and not the reference's. Control strings in texts "
            f"{'stay text' if is_safe else 'become control tokens, as sanitize_control_tokens is False'}.",
        )

    def _say_once(self, kind: str, key: str, message: str) -> None:
        if (kind, hash(key)) not in self._caches.said:
            self._caches.said.add((kind, hash(key)))
            warnings.warn(message, CustomTemplateWarning, stacklevel=4)

    def parse_response(
        self, response: Any, schema: dict[str, Any] | None = None, *, prefix: Any = None, tools: Any = None
    ) -> Any:
        """Return an answer as a message, or a batch of answers as messages, as transformers' method of this name does.

        response: text with its control tokens, or ids, which are exact; a list of texts or a second dimension of ids
            is a batch.
        schema: a response template; one that is none of ours, passed or set, is left to transformers, and a
            CustomTemplateWarning says so once.
        prefix: the prompt, or one for each answer. It matters only where the answer's ids continue a text in it.

        Raises nothing for any answer; `tool_calls.parse_answer` also says what could not be read, and why.
        """
        if schema is not None and not isinstance(schema, Mapping):
            raise KeywordError(
                f"parse_response(): schema {show(schema)}; it is a response template; the prompt is prefix"
            )
        template = self.response_template if schema is None else schema
        if response_format_of(template) is None:
            source = "that is passed" if schema is not None else f"of {self.name_or_path or 'this tokenizer'}"
            self._say_once(
                "response_template",
                repr(template),
                f"the response template {source} is none of this package's: transformers reads answers with it, from "
                "their text, in which a control string that was spelled out looks like the token",
            )
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

    def _as_encoding(
        self,
        prompts: Sequence[tuple[list[int], list[int]]],
        *,
        padding: Any,
        truncation: Any,
        max_length: int | None,
        return_assistant_tokens_mask: bool,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool = True,
        verbose: bool = True,
    ) -> dict[str, list[list[int]]]:
        """Return ids and masks of prompts, one row each, truncated and padded as transformers does it."""
        padding, truncation, max_length = self.strategies(padding, truncation, max_length, pad_to_multiple_of, verbose)
        encoding = {"input_ids": [ids for ids, _ in prompts]}
        if return_attention_mask:
            encoding["attention_mask"] = [[1] * len(ids) for ids, _ in prompts]
        if return_assistant_tokens_mask:
            encoding["assistant_masks"] = [mask for _, mask in prompts]
        if truncation != TruncationStrategy.DO_NOT_TRUNCATE:
            is_right = self.truncation_side == "right"
            kept = [slice(max_length) if is_right else slice(max(len(ids) - max_length, 0), None) for ids, _ in prompts]
            encoding = {
                name: [row[part] for row, part in zip(rows, kept, strict=True)] for name, rows in encoding.items()
            }
        for ids in encoding["input_ids"]:
            self.warn_of_length(ids, max_length, verbose)
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
            backend = read_tokenizer_json(tokenizer_file)
        except TokenizerFileError:
            # Beside tokenizer.model.v3 the vendor publishes a tokenizer.json that is not exact.
            if vocab_file is None:
                raise
        else:
            if vocab_file is not None and known_vocabulary(vocab_file) is None:
                raise TokenizerFileError(
                    f"{vocab_file}: other pieces, scores, types or settings than the vendor's file, which "
                    f"tokenizer.json next to it was made of; {RULE}; download it again, or remove it"
                )
            return backend
    if vocab_file is None:
        raise TokenizerFileError(f"neither vocab_file nor tokenizer_file is given; {RULE}; {WAY_OUT}")
    return load_sentencepiece_bpe(vocab_file)


def _text_encoder(backend: Tokenizer, reference_documents_as_text: bool) -> Callable[[str], list[int]]:
    """Return what encodes a text on the same model, takes special tokens for text, and knows the tokens added since."""
    added: list[AddedToken] = [token for _, token in added_tokens(backend)]
    if not added:
        return TextEncoder(backend, reference_documents_as_text=reference_documents_as_text)
    text_backend = clone_backend(backend, added=added, reference_documents_as_text=reference_documents_as_text)
    text_backend.encode_special_tokens = True
    return lambda text: text_backend.encode(text, add_special_tokens=False).ids


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


def _is_batch(conversation: Any) -> bool:
    if not isinstance(conversation, list | tuple) or not conversation:
        return False
    first = conversation[0]
    is_request = hasattr(first, "messages") or (isinstance(first, dict) and "messages" in first)
    return is_request or isinstance(first, list | tuple)


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
