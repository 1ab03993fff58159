"""Chat with a tokenizer: prompts assembled from segments, completions parsed into messages."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from threading import local
from typing import Any

from transformers import BatchEncoding
from transformers.tokenization_utils_base import TruncationStrategy
from transformers.utils.generic import PaddingStrategy, to_py_obj

from mistral_large_conversion.chat_templates import prompt_format_of, response_format_of
from mistral_large_conversion.vocabulary import Vocabulary
from modeling_mistral_large.custom_templates import CustomPrompts, template_variables
from modeling_mistral_large.errors import ConversationError, KeywordError
from modeling_mistral_large.instruct.answer import parse_answer
from modeling_mistral_large.instruct.formats import format_problem
from modeling_mistral_large.instruct.json_text import show
from modeling_mistral_large.instruct.prompt import Segment, build_prompt
from modeling_mistral_large.transformers_api.keywords import declared_options, refuse_unknown_options
from modeling_mistral_large.transformers_api.tokenizers import HOST_CHAT_OPTIONS, TokenizerHook

# What `tokenizer_kwargs` can still say about a prompt that is put together from segments.
TOKENIZER_KWARGS = ("padding_side", "pad_to_multiple_of", "return_attention_mask", "verbose")

# Our options of `apply_chat_template`, which no other template can keep to.
FORMAT_OPTIONS = ("strict", "finetuning", "reference_documents_as_text")
# Templates that are none of ours whose encoders are remembered.
MOST_TEMPLATES = 8


class CustomTemplateWarning(UserWarning):
    """A chat or response template that is not ours: what it gives is the template's, not the reference's."""


class TokenizerCaches:
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

    def __reduce__(self) -> tuple[type["TokenizerCaches"], tuple[()]]:
        return TokenizerCaches, ()


class ChatTokenizer(TokenizerHook):
    """`apply_chat_template` and `parse_response` of a tokenizer that encodes texts and knows its pieces."""

    _caches: TokenizerCaches

    def encode_texts(self, texts: Sequence[str], *, reference_documents_as_text: bool = False) -> list[list[int]]:
        """Return the ids of texts without control tokens."""
        raise NotImplementedError

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary, which has the ids of control tokens."""
        raise NotImplementedError

    @property
    def pieces(self) -> list[str]:
        """The pieces by id."""
        raise NotImplementedError

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
        training sample. `reference_documents_as_text=True` keeps those pieces from a text that the reference does take
        from it: `[REFERENCE_DOC_n]`, and with the v7 vocabulary `[REF]` and `[/REF]`.

        A `chat_template` that is none of ours, passed or set, is rendered by transformers, and a CustomTemplateWarning
        says so once. Control strings in texts stay text all the same, unless `sanitize_control_tokens` is False. Other
        keywords are variables of such a template.

        Raises ConversationError with the message index, the problem, the rule and the way out; KeywordError for a
        keyword that neither this method nor the template takes.
        """
        template = self.get_chat_template(chat_template, tools)
        if add_generation_prompt and continue_final_message:
            raise ConversationError(
                "add_generation_prompt and continue_final_message: the response to come is either new or the last "
                "message's rest; leave one of the two out"
            )
        options: dict[str, Any] = {
            "tools": tools,
            "documents": documents,
            "tokenize": tokenize,
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
            raise ValueError(
                "return_assistant_tokens_mask=True: needs return_dict=True and tokenize=True; pass both, or leave "
                "the mask out"
            )
        tokenizer_kwargs = tokenizer_kwargs or {}
        if unknown := [name for name in tokenizer_kwargs if name not in TOKENIZER_KWARGS]:
            raise ValueError(
                f"tokenizer_kwargs {unknown}: of a prompt only {', '.join(TOKENIZER_KWARGS)} can be chosen; leave "
                "the others out"
            )
        is_batch = _is_batch(conversation)
        conversations = list(conversation) if is_batch else [conversation]
        prompt_format = prompt_format_of(template)
        if prompt_format is None:
            is_safe = sanitize_control_tokens is not False
            self._say_custom(chat_template, template, is_safe=is_safe)
            rows = self._custom_prompts(template, conversations, is_safe=is_safe, variables=kwargs, **options)
        else:
            rows = self._own_prompts(prompt_format, conversations, **options, **kwargs)
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
        prompt_format: str,
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
        """Return prompts of one of our formats, as text or as ids and marks of what the assistant says."""
        refuse_unknown_options("apply_chat_template", unknown, (*_CHAT_OPTIONS, *FORMAT_OPTIONS))
        if continue_final_message not in (False, True, "content"):
            raise ConversationError(
                f"continue_final_message={continue_final_message!r}: only 'content' can be continued; pass True"
            )
        if documents:
            raise ConversationError(
                f"documents: the {prompt_format} format has no place for them; write them into a message or a tool's "
                "result"
            )
        vocabulary = self.vocabulary
        if problem := format_problem(prompt_format, vocabulary):
            raise ConversationError(f"the chat template writes {prompt_format} prompts: {problem}")
        prompts = [
            build_prompt(
                messages,
                tools,
                prompt_format=prompt_format,
                continue_final_message=bool(continue_final_message),
                strict=strict,
                finetuning=finetuning,
            )
            for messages in conversations
        ]
        if not tokenize:
            return ["".join(map(_render, prompt)) for prompt in prompts]
        texts = [segment.text for prompt in prompts for segment in prompt if not segment.is_control]
        text_ids = iter(self.encode_texts(texts, reference_documents_as_text=reference_documents_as_text))
        segment_ids = [
            [[vocabulary.control_tokens[segment.text]] if segment.is_control else next(text_ids) for segment in prompt]
            for prompt in prompts
        ]
        masks = [
            [int(segment.is_generated) for segment, ids in zip(prompt, ids_of, strict=True) for _ in ids]
            if return_assistant_tokens_mask
            else []
            for prompt, ids_of in zip(prompts, segment_ids, strict=True)
        ]
        return [(list(chain.from_iterable(ids_of)), mask) for ids_of, mask in zip(segment_ids, masks, strict=True)]

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
        """Return a response as a message, or a batch of them as messages, as transformers' method of this name does.

        response: text with its control tokens, or ids, which are exact; a list of texts or a second dimension of ids
            is a batch.
        schema: a response template; one that is none of ours, passed or set, is left to transformers, and a
            CustomTemplateWarning says so once.
        prefix: the prompt, or one for each response. It matters only where the response's ids continue a text in it.

        Raises nothing for any response; `tool_calls.parse_answer` also says what could not be read, and why.
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
                f"the response template {source} is none of this package's: transformers reads responses with it, from "
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
            parse_answer(answer, self.pieces, continues_text=_ends_in_text(prompt, self.vocabulary)).message
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


# The options that are not variables of a template.
_CHAT_OPTIONS = tuple(name for name in declared_options(ChatTokenizer.apply_chat_template) if name != "self")


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


def _ends_in_text(prompt: str | Sequence[int], vocabulary: Vocabulary) -> bool:
    if isinstance(prompt, str):
        return bool(prompt) and not prompt.endswith(tuple(vocabulary.control_tokens))
    return bool(prompt) and prompt[-1] not in vocabulary.control_ids


def _render(segment: Segment) -> str:
    """Return a segment as a rendered prompt writes it: a text, unless it is empty, after the space its dummy ▁ is."""
    return segment.text if segment.is_control or not segment.text else f" {segment.text}"
