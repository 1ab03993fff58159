"""Prompts from a chat template that is none of ours: rendered by transformers, with control strings in texts as text.

A template gives a string, in which a control string of the template and one of a message look alike. So the first
character of each control string in what the caller passes is exchanged, before rendering, for a character that occurs
nowhere; in the rendered prompt only the template's own control strings are left to match, and the characters come back
in the texts between them, which are encoded as text. That holds for strings as the template hands them on, whole or
side by side: a template that cuts texts up, or builds control strings out of them (`"<|" + role + "|>"`), is
responsible for what it builds.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta
from tokenizers import AddedToken, Tokenizer
from transformers.utils.chat_template_utils import get_json_schema

from mistral_large_conversion.sentencepiece_bpe import added_tokens, clone_backend
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct.json_text import check_unicode, show
from modeling_mistral_large.transformers_api.tokenizers import render_chat_template

# Characters for private use, of which a text holds hardly any.
_PLACEHOLDERS = range(0x100000, 0x10FFFE)
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
_JINJA = Environment(extensions=["jinja2.ext.loopcontrols"])


class RenderedPrompt(NamedTuple):
    """Ids of a prompt, and for each 1 where the template's `generation` tags enclose its text, else 0."""

    ids: list[int]
    assistant_mask: list[int]


@lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str]:
    """Return the names that a chat template reads and does not set.

    Raises ConversationError where it is no template.
    """
    try:
        return frozenset(meta.find_undeclared_variables(_JINJA.parse(_GENERATION_TAG.sub("", template))))
    except TemplateSyntaxError as error:
        raise ConversationError(
            f"chat_template: not a Jinja template, line {error.lineno}: {error}; correct it"
        ) from error


class CustomPrompts:
    """What renders and encodes the prompts of one template that is not ours, for one state of a tokenizer's tokens."""

    def __init__(self, template: str, backend: Tokenizer, control_tokens: Sequence[str] = ()) -> None:
        self.template = template
        added = backend.get_added_tokens_decoder()
        # An added token that the template writes is a control token to it, whatever its flag says.
        control = {
            index: token
            for index, token in added.items()
            if token.special or token.content in template or token.content in control_tokens
        }
        self._control_ids = frozenset(control)
        self._protect = _Protection(token.content for token in control.values())
        self._backend = clone_backend(backend)
        # The same with control strings as text; what follows a control token has no dummy ▁ of its own.
        tokens = added_tokens(backend)
        for index, token in tokens:
            token.special = token.special or index in control
        self._encode_start = _text_encoder(backend, [token for _, token in tokens], dummy=True)
        self._encode_rest = _text_encoder(backend, [token for _, token in tokens], dummy=False)

    def render(
        self,
        conversations: Sequence[Any],
        *,
        tools: Any,
        documents: Any,
        variables: Mapping[str, Any],
        own_variables: Mapping[str, Any],
        is_safe: bool = True,
        **options: Any,
    ) -> tuple[list[str], list[Any], Mapping[int, str]]:
        """Return prompts as text, spans of characters the assistant says, and what stands for which placeholder.

        variables: are the caller's, `own_variables` the tokenizer's.
        is_safe: keep control strings in what the caller passes apart from the template's.
        options: of transformers' renderer.

        Raises ConversationError where the template or the renderer refuses, or something is no JSON value.
        """
        given = {
            "conversations": [_messages(conversation) for conversation in conversations],
            "tools": None if tools is None else [_tool(tool) for tool in _listed(tools, "tools")],
            "documents": None if documents is None else _plain(documents, "documents"),
            "variables": _plain(dict(variables), "template variables"),
        }
        characters = self._protect.characters(self.template, given) if is_safe else {}
        given = self._protect(given, characters) if is_safe else given
        try:
            texts, spans = render_chat_template(
                given["conversations"],
                self.template,
                tools=given["tools"],
                documents=given["documents"],
                **options,
                **{**own_variables, **given["variables"]},
            )
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise ConversationError(f"the chat template refuses the conversation: {error}") from error
        for placeholder, character in characters.items():
            # What `tojson(ensure_ascii=True)` makes of it.
            if any(json.dumps(placeholder)[1:-1] in text for text in texts):
                raise ConversationError(
                    f"the chat template escapes the {character!r} of a control string in a text, which cannot be kept "
                    "apart then; take the string out of the text"
                )
        return texts, spans, {ord(placeholder): character for placeholder, character in characters.items()}

    def encode(self, text: str, spans: Sequence[tuple[int, int]], characters: Mapping[int, str]) -> RenderedPrompt:
        """Return the ids of a rendered prompt as the tokenizer's own call gives them, but control strings in its texts
        are text.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        tokens = list(zip(encoding.ids, encoding.offsets, strict=True))
        if any(chr(placeholder) in text for placeholder in characters):
            control = [(index, offset) for index, offset in tokens if index in self._control_ids]
            tokens, end = [], 0
            for index, (start, stop) in [*control, (None, (len(text), len(text)))]:
                encode = self._encode_rest if end else self._encode_start
                part = encode(text[end:start].translate(characters))
                tokens += [(token, (end + first, end + last)) for token, (first, last) in part]
                tokens += [] if index is None else [(index, (start, stop))]
                end = stop
        mask, span = [], 0
        for _, (start, stop) in tokens:
            while span < len(spans) and start >= spans[span][1]:
                span += 1
            mask.append(int(span < len(spans) and stop > spans[span][0]))
        return RenderedPrompt([index for index, _ in tokens], mask)


class _Protection:
    """Exchanges characters so that no text holds a control string, nor an end that its neighbour could complete."""

    def __init__(self, control_strings: Iterable[str]) -> None:
        strings = sorted(set(control_strings), key=len, reverse=True)
        self._firsts = sorted({string[0] for string in strings} | {string[-1] for string in strings})
        self._whole = re.compile("|".join(map(re.escape, strings)) or "(?!)")
        self._starts = frozenset(string[:cut] for string in strings for cut in range(1, len(string)))
        self._ends = frozenset(string[cut:] for string in strings for cut in range(1, len(string)))
        self._longest = max(map(len, strings), default=0)

    def characters(self, template: str, given: Any) -> dict[str, str]:
        """Return a placeholder that occurs nowhere for each character that may have to be exchanged."""
        taken = {*template, *json.dumps(given, ensure_ascii=False)}
        free = (chr(code) for code in _PLACEHOLDERS if chr(code) not in taken)
        return dict(zip(free, self._firsts, strict=False))

    def __call__(self, given: Any, characters: Mapping[str, str]) -> Any:
        """Return plain data with the characters of its strings exchanged, keys included."""
        placeholders = {character: placeholder for placeholder, character in characters.items()}

        def protect(value: Any) -> Any:
            if isinstance(value, str):
                return self._protect(value, placeholders)
            if isinstance(value, dict):
                return {protect(key): protect(item) for key, item in value.items()}
            return [protect(item) for item in value] if isinstance(value, list) else value

        return protect(given)

    def _protect(self, text: str, placeholders: Mapping[str, str]) -> str:
        found = 1
        while found:
            # Again, as one control string may stand inside of another.
            text, found = self._whole.subn(lambda match: placeholders[match[0][0]] + match[0][1:], text)
        # Templates strip texts, and set them side by side.
        head, tail = text.lstrip(), text.rstrip()
        for length in range(min(self._longest, len(head)), 0, -1):
            if head[:length] in self._ends:
                cut = len(text) - len(head) + length
                text = text[: cut - 1] + placeholders[head[length - 1]] + text[cut:]
                break
        tail = text.rstrip()
        for length in range(min(self._longest, len(tail)), 0, -1):
            if tail[-length:] in self._starts:
                cut = len(tail) - length
                return text[:cut] + placeholders[tail[cut]] + text[cut + 1 :]
        return text


def _text_encoder(
    backend: Tokenizer, added: Sequence[AddedToken], *, dummy: bool
) -> Callable[[str], list[tuple[int, tuple[int, int]]]]:
    text_backend = clone_backend(backend, added=added, dummy=dummy)
    text_backend.encode_special_tokens = True

    def encode(text: str) -> list[tuple[int, tuple[int, int]]]:
        encoding = text_backend.encode(text, add_special_tokens=False)
        return list(zip(encoding.ids, encoding.offsets, strict=True))

    return encode


def _messages(conversation: Any) -> list[Any]:
    messages = getattr(conversation, "messages", conversation)
    if len(_listed(messages, "messages")) == 0:
        raise ConversationError("no messages: a conversation has at least one; pass a user message")
    read = [_plain(message, f"message {index}") for index, message in enumerate(messages)]
    for index, message in enumerate(read):
        if not isinstance(message, dict):
            raise ConversationError(f"message {index}: {show(message)}; a message is a dict; pass one")
    # As transformers does: a template takes a key that is there for one that says something.
    return [{key: value for key, value in message.items() if value is not None} for message in read]


def _tool(tool: Any) -> Any:
    return get_json_schema(tool) if callable(tool) and not isinstance(tool, Mapping) else _plain(tool, "tools")


def _listed(values: Any, where: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple):
        raise ConversationError(f"{where}: {show(values)}; they are a list; pass one")
    return values


def _plain(value: Any, where: str) -> Any:
    """Return a value made of dicts, lists, strings, numbers, booleans and None: what a template may see."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return check_unicode(str.__str__(value), where)
    if callable(dump := getattr(value, "model_dump", None)):
        value = dump()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    raise ConversationError(f"{where}: {show(value)}; a chat template gets JSON values; convert it")
