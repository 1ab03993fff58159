"""Samples as token ids: conversations in the exact prompt format, texts in windows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mistral_large_conversion.errors import ConversationError, SampleFileError, SettingError
from mistral_large_conversion.samples import Sample
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class TokenSequence:
    """Token ids that begin at position 0, and which of them are scored: `is_scored[0]` is always False.

    is_cut: the sample had more tokens than there was room for.
    """

    ids: tuple[int, ...]
    is_scored: tuple[bool, ...]
    is_cut: bool = False


def tokenize_samples(
    samples: Sequence[Sample],
    tokenizer: Any,
    *,
    length: int = DEFAULT_LENGTH,
    limit: int | None = None,
    scores_prompts: bool = False,
) -> list[TokenSequence]:
    """Return the samples as sequences of at most `length` tokens, the first `limit` of them.

    Texts are cut into windows, each of which begins with `<s>` where the tokenizer puts one before a text; control
    strings in them stay text. Conversations are rendered by the tokenizer's prompt format, responses included; of one
    that is longer, the start is kept.

    tokenizer: a `MistralLargeTokenizer`, or transformers' own of another vocabulary, whose own rules then hold.
    scores_prompts: score all tokens of a conversation, and not only what the assistant says. All tokens of texts are
        scored, and all of a conversation where the template does not mark the assistant's.

    Raises:
        SampleFileError: a conversation that the prompt format does not have; the message has its line. Or no sequence
            of two tokens.
        SettingError: a length below 2.
    """
    if length < 2:
        raise SettingError(f"length={length}: a token is scored given those before it; pass 2 or more")
    sequences: list[TokenSequence] = []
    for sample in samples:
        made = (
            _windows(sample.text, tokenizer, length)
            if sample.text is not None
            else [_conversation(sample, tokenizer, length, scores_prompts=scores_prompts)]
        )
        for sequence in made:
            # Nothing is predicted of a single token.
            if len(sequence.ids) > 1:
                sequences.append(sequence)
            if len(sequences) == limit:
                return sequences
    if not sequences:
        raise SampleFileError(f"{samples[0].where}: too short: a sequence has two tokens or more; take a longer text")
    return sequences


def _windows(text: str, tokenizer: Any, length: int) -> Iterator[TokenSequence]:
    if isinstance(tokenizer, MistralLargeTokenizer):
        ids = tokenizer.encode_texts([text])[0]
        prefix = [tokenizer.bos_token_id]
    else:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        bos = tokenizer.bos_token_id
        prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    room = length - len(prefix)
    for start in range(0, len(ids), room):
        window = (*prefix, *ids[start : start + room])
        yield TokenSequence(window, (False, *[True] * (len(window) - 1)))


def _conversation(sample: Sample, tokenizer: Any, length: int, *, scores_prompts: bool) -> TokenSequence:
    options: dict[str, Any] = {"tools": sample.tools, "return_dict": True}
    marks_assistant = isinstance(tokenizer, MistralLargeTokenizer) and tokenizer.prompt_format is not None
    try:
        encoding = tokenizer.apply_chat_template(
            sample.messages, **options, **({"return_assistant_tokens_mask": True} if marks_assistant else {})
        )
    except (ConversationError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise SampleFileError(f"{sample.where}: {reason}") from error
    ids = encoding["input_ids"]
    mask = encoding["assistant_masks"] if marks_assistant and not scores_prompts else [1] * len(ids)
    is_scored = [False, *map(bool, mask[1:length])]
    return TokenSequence(tuple(ids[:length]), tuple(is_scored), is_cut=len(ids) > length)
