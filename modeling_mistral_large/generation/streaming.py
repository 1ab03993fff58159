"""Streamers for `generate` that keep the spaces at the start of lines."""

from typing import Any

from torch import Tensor
from transformers import TextIteratorStreamer, TextStreamer

from mistral_large_conversion.vocabulary import NEWLINE_ID


class _KeepsLineStarts(TextStreamer):
    """Makes transformers' streamers emit what `decode` returns for the whole response.

    They forget a line once it is out, and decode the next one on its own: the space in front of it would be taken for
    the one the tokenizer puts before every text, and dropped. So would that of the first word after a prompt that ends
    in a text, which the response continues.
    """

    def put(self, value: Tensor) -> None:
        is_skipped = self.skip_prompt and self.next_tokens_are_prompt
        super().put(value)  # type: ignore[no-untyped-call]
        tokenizer: Any = self.tokenizer
        goes_on = value.numel() > 0 and int(value.flatten()[-1]) not in tokenizer.vocabulary.control_ids
        if not self.token_cache and (goes_on or not is_skipped):
            self.token_cache, self.print_len = [NEWLINE_ID], len("\n")


class MistralLargeTextStreamer(_KeepsLineStarts):
    """transformers' TextStreamer, exact for this tokenizer."""


class MistralLargeTextIteratorStreamer(_KeepsLineStarts, TextIteratorStreamer):
    """transformers' TextIteratorStreamer, exact for this tokenizer."""
