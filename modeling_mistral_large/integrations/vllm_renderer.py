"""How vLLM makes prompts of conversations for our tokenizer: as ids, so that texts stay text."""

import os
from dataclasses import replace
from typing import Any

from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import CachedHfTokenizer, get_cached_tokenizer

from mistral_large_conversion.vocabulary import piece_bytes
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.instruct.answer import TOOL_CALLS_ID

# Control characters that texts have none of, and JSON may not have.
UNWRITTEN = frozenset(range(32)) - set(b"\t\n\r")


class ServedTokenizer(MistralLargeTokenizer):
    """Our tokenizer with a vocabulary in which grammar libraries find no control token as text.

    By their spelling, xgrammar would take them for text: a schema with the word `[INST]` in it could be answered by the
    token, which detokenizing drops. vLLM looks `[TOOL_CALLS]` up to read calls, so that one stays. Control characters
    are left out, too: xgrammar 0.2.8 takes all but line ends for characters of a JSON string with a `maxLength`.
    """

    def get_vocab(self) -> dict[str, int]:
        """Return ids by piece, those of control tokens and of control characters but tab and line ends left out."""
        hidden = {*self.vocabulary.control_ids} - {TOOL_CALLS_ID}
        return {
            piece: index
            for piece, index in super().get_vocab().items()
            if index not in hidden and UNWRITTEN.isdisjoint(piece_bytes(piece))
        }


class VllmTokenizer(CachedHfTokenizer):  # type: ignore[misc, unused-ignore]
    """Our tokenizer as vLLM loads it, of a folder or repository of any model type, thus of `mistral`, too."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | os.PathLike[str],
        *args: Any,
        trust_remote_code: bool = False,
        revision: str | None = None,
        download_dir: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load it; errors are those of `MistralLargeTokenizer.from_pretrained`."""
        # Every tokenizer of ours is made by our class: what is remote is not run.
        place = {"revision": revision or "main", "cache_dir": download_dir}
        tokenizer = MistralLargeTokenizer.from_pretrained(path_or_repo_id, *args, **place, **kwargs)
        # The class's own `from_pretrained` would look for its name in the folder.
        tokenizer.__class__ = ServedTokenizer
        return get_cached_tokenizer(tokenizer)


class MistralLargeRenderer(HfRenderer):  # type: ignore[misc, unused-ignore]
    """vLLM's renderer for tokenizers of transformers, asking ours for ids instead of a string."""

    def render_messages(self, messages: list[Any], params: ChatParams) -> Any:
        """Return the conversation as vLLM reads it, and its prompt."""
        return super().render_messages(_as_the_model_said(messages), _as_ids(params))

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> Any:
        """Return the same as `render_messages`, which the server does not call."""
        return await super().render_messages_async(_as_the_model_said(messages), _as_ids(params))


def _as_ids(params: ChatParams) -> ChatParams:
    return replace(params, chat_template_kwargs={**params.chat_template_kwargs, "tokenize": True})


def _as_the_model_said(messages: list[Any]) -> list[Any]:
    """Take the space away with which vLLM begins every response, and with which clients send it back.

    It belongs to the format, which has one space between a control token and a text: a response sent back with it would
    have two, and its ids would not be the ones the model said.
    """
    return [
        {**message, "content": message["content"].removeprefix(" ")}
        if message["role"] == "assistant" and isinstance(message.get("content"), str)
        else message
        for message in messages
    ]
