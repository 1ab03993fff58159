"""Two checkpoints side by side over the same tokens: how far apart their predictions are, one layer at a time."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mistral_large_conversion.checkpoint import Checkpoint, open_checkpoint
from mistral_large_conversion.errors import CheckpointError, SettingError
from mistral_large_conversion.progress import Progress, progress_calls
from mistral_large_conversion.samples import Sample
from mistral_large_conversion.vocabulary import CONTROL_IDS, REFERENCE_IDS
from modeling_mistral_large.any_folder import load_tokenizer
from modeling_mistral_large.streamed.activations import Activations
from modeling_mistral_large.streamed.divergence import Divergence, measure_divergence
from modeling_mistral_large.streamed.layer_stream import LayerStream, release
from modeling_mistral_large.streamed.token_sequences import DEFAULT_LENGTH, TokenSequence, tokenize_samples
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

# Tokens whose logits are made at once: a block of them is 0.1 GB.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Comparison:
    """What a candidate's predictions are against a reference's, over all scored tokens.

    kl_mean, kl_p99: mean and 99th percentile of the KL divergence from the reference, in nats, of whole vocabularies.
    top1_agreement: share of the tokens at which both have the same most likely token.
    flips_per_10k: tokens in 10,000 at which greedy decoding flips, that is, the most likely token is another one.
    perplexity_reference, perplexity_candidate: exponential of the mean negative log-likelihood of the text.
    tokens: how many are scored.
    kl_standard_error: of `kl_mean`, by sequence, as tokens of one are not independent; None for a single sequence.
    hidden_errors: after each decoder layer, the norm of the difference of all hidden states divided by the norm of the
        reference's; empty where the models have another number of layers or another width.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    flips_per_10k: float
    perplexity_reference: float
    perplexity_candidate: float
    tokens: int
    kl_standard_error: float | None
    hidden_errors: tuple[float, ...]


def compare_checkpoints(
    reference: Checkpoint | Path | str,
    candidate: Checkpoint | Path | str,
    samples: Sequence[Sample],
    *,
    length: int = DEFAULT_LENGTH,
    limit: int | None = None,
    scores_prompts: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | bool = False,
) -> Comparison:
    """Compare checkpoints of any layout, dtype and quantization over the tokens that the reference makes of samples.

    samples: see `mistral_large_conversion.samples.read_samples`.
    length, limit, scores_prompts: see `tokenize_samples`.
    dtype: in which both compute; without it, each computes in the dtype it would be loaded in.
    progress: is told the bytes of weights that are done; True for a bar.

    Raises:
        CheckpointError: no whole checkpoint, or one of another vocabulary than the reference's.
        TokenizerFileError: no tokenizer, so that the vocabulary is not known.
        SampleFileError, SettingError: samples that give no tokens, and values that mean nothing; logits that are not
            finite, as float16 may make them.
    """
    of_reference, of_candidate = (
        each if isinstance(each, Checkpoint) else open_checkpoint(each) for each in (reference, candidate)
    )
    streams, sequences = open_pair(
        of_reference,
        of_candidate,
        samples,
        length=length,
        limit=limit,
        scores_prompts=scores_prompts,
        dtype=dtype,
        device=device,
    )
    return compare_streams(*streams, sequences, progress=progress)


def open_pair(
    reference: Checkpoint,
    candidate: Checkpoint,
    samples: Sequence[Sample],
    *,
    length: int = DEFAULT_LENGTH,
    limit: int | None = None,
    scores_prompts: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[tuple[LayerStream, LayerStream], list[TokenSequence]]:
    """Return what `compare_streams` takes: two models of one vocabulary, and the samples as the reference's tokens.

    Arguments and errors are those of `compare_checkpoints`; no weights are read yet.
    """
    streams = tuple(LayerStream(checkpoint, dtype=dtype, device=device) for checkpoint in (reference, candidate))
    tokenizers = [load_tokenizer(stream.checkpoint.folder, {}) for stream in streams]
    sequences = tokenize_samples(samples, tokenizers[0], length=length, limit=limit, scores_prompts=scores_prompts)
    check_vocabularies(streams[0], streams[1], tokenizers, sequences)
    return (streams[0], streams[1]), sequences


def check_vocabularies(
    reference: LayerStream, candidate: LayerStream, tokenizers: Sequence[Any], sequences: Sequence[TokenSequence]
) -> None:
    """Check that each id is the same piece for both models; the candidate may have more of them.

    The vocabularies of v3 and v7 differ in seven control pieces: they are taken for the same if none of these occurs.

    Raises:
        CheckpointError: vocabularies that are not the same.
    """
    places = [stream.checkpoint.folder for stream in (reference, candidate)]
    sizes = [stream.config.vocab_size for stream in (reference, candidate)]
    rule = "models are compared over one vocabulary"
    if sizes[1] < sizes[0]:
        raise CheckpointError(
            f"{places[1]}: {sizes[1]} tokens, {places[0]} has {sizes[0]}; {rule}, and only the candidate may have "
            "more; exchange the two, or compare it with the checkpoint it was made of"
        )
    pieces = [{index: piece for piece, index in tokenizer.get_vocab().items()} for tokenizer in tokenizers]
    differing = {index for index, piece in pieces[0].items() if index < sizes[0] and pieces[1].get(index) != piece}
    are_known = all(isinstance(tokenizer, MistralLargeTokenizer) for tokenizer in tokenizers)
    if are_known and all(index in CONTROL_IDS or index in REFERENCE_IDS for index in differing):
        differing &= {index for sequence in sequences for index in sequence.ids}
    if differing:
        index = min(differing)
        raise CheckpointError(
            f"{places[1]}: token {index} is {pieces[1].get(index)!r}, that of {places[0]} is {pieces[0][index]!r}; "
            f"{rule}; compare it with the checkpoint it was made of"
        )


def compare_streams(
    reference: LayerStream,
    candidate: LayerStream,
    sequences: Sequence[TokenSequence],
    *,
    progress: Progress | bool = False,
) -> Comparison:
    """Compare two models of one vocabulary over token ids, see `compare_checkpoints`.

    Raises:
        SettingError: no token is scored, a sequence is longer than a model's context, or logits are not finite.
    """
    if not any(any(sequence.is_scored) for sequence in sequences):
        raise SettingError(
            "no token is scored: conversations without assistant tokens in the first tokens that are kept; raise "
            "length, or score all tokens"
        )
    lengths = [len(sequence.ids) for sequence in sequences]
    for stream in (reference, candidate):
        if max(lengths) > stream.config.max_position_embeddings:
            raise SettingError(
                f"length {max(lengths)}: {stream.checkpoint.folder} has a context of "
                f"{stream.config.max_position_embeddings} tokens; a sequence fits into it; pass a smaller length"
            )
    streams = (reference, candidate)
    total = sum(stream.layer_bytes() for stream in streams)
    with ExitStack() as stack:
        advance = stack.enter_context(progress_calls(progress, "comparing", total))
        hidden = [
            stack.enter_context(Activations(lengths, stream.config.hidden_size, stream.dtype)) for stream in streams
        ]
        for stream, states in zip(streams, hidden, strict=True):
            for index, sequence in enumerate(sequences):
                states[index] = stream.embed(torch.tensor([sequence.ids]))
        errors = _run_layers(streams, hidden, advance)
        divergences = _measure(streams, hidden, sequences)
    return _summary(streams, sequences, divergences, errors)


def _run_layers(
    streams: tuple[LayerStream, LayerStream], hidden: Sequence[Activations], advance: Progress
) -> tuple[float, ...]:
    """Run all decoder layers on all sequences in place, and return the errors of the hidden states after each."""
    reference, candidate = streams
    are_alike = (reference.layer_count, hidden[0].width) == (candidate.layer_count, hidden[1].width)
    errors = []
    for number in range(max(reference.layer_count, candidate.layer_count)):
        for stream, states in zip(streams, hidden, strict=True):
            if number < stream.layer_count:
                layer = stream.load_layer(number)
                for index in range(len(states)):
                    states[index] = stream.run(layer, states[index])
                release(layer)
                advance(stream.layer_bytes(number))
        if are_alike:
            errors.append(_relative_error(*hidden))
    return tuple(errors)


def _relative_error(expected: Activations, found: Activations) -> float:
    difference = size = 0.0
    for index in range(len(expected)):
        wanted = expected[index].float()
        # A norm of float32 is summed up in blocks, so that its rounding does not grow with the number of elements.
        difference += float((found[index].float() - wanted).norm()) ** 2
        size += float(wanted.norm()) ** 2
    return math.sqrt(difference / size) if size else 0.0


def _measure(
    streams: tuple[LayerStream, LayerStream], hidden: Sequence[Activations], sequences: Sequence[TokenSequence]
) -> Divergence:
    """Compare the predictions of all scored tokens, in order."""
    parts: list[Divergence] = []
    waiting: list[tuple[Tensor, Tensor]] = []
    targets: list[Tensor] = []

    def flush() -> None:
        pair = [stream.norm(torch.cat(rows)) for stream, rows in zip(streams, zip(*waiting, strict=True), strict=True)]
        parts.append(measure_divergence(*streams, (pair[0], pair[1]), torch.cat(targets)))
        waiting.clear()
        targets.clear()

    for index, sequence in enumerate(sequences):
        places = torch.tensor(sequence.is_scored).nonzero()[:, 0]
        if not len(places):
            continue
        # What is predicted of a token comes from the one before it.
        waiting.append((hidden[0][index][0, places - 1], hidden[1][index][0, places - 1]))
        targets.append(torch.tensor(sequence.ids)[places])
        if sum(map(len, targets)) >= TOKENS_AT_ONCE:
            flush()
    if waiting:
        flush()
    return Divergence(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def _summary(
    streams: tuple[LayerStream, LayerStream],
    sequences: Sequence[TokenSequence],
    found: Divergence,
    errors: tuple[float, ...],
) -> Comparison:
    # Where the candidate rules out what the reference does not, its own loss may still be finite.
    for stream, values in zip(streams, (found.loss_reference, found.loss_candidate + found.kl), strict=True):
        if not values.isfinite().all():
            raise SettingError(
                f"{stream.checkpoint.folder}: its logits are not finite in {str(stream.dtype).removeprefix('torch.')}; "
                "nothing can be said of such predictions; pass dtype float32, or verify the checkpoint"
            )
    return Comparison(
        kl_mean=found.kl.mean().item(),
        kl_p99=float(np.quantile(found.kl.numpy(), 0.99)),
        top1_agreement=found.agrees.double().mean().item(),
        flips_per_10k=10_000 * (len(found.agrees) - int(found.agrees.sum())) / len(found.agrees),
        perplexity_reference=found.loss_reference.mean().exp().item(),
        perplexity_candidate=found.loss_candidate.mean().exp().item(),
        tokens=len(found.kl),
        kl_standard_error=_standard_error(found.kl, [sum(sequence.is_scored) for sequence in sequences]),
        hidden_errors=errors,
    )


def _standard_error(values: Tensor, counts: Sequence[int]) -> float | None:
    """Return the standard error of the mean of values that come in groups of `counts`, by the spread of the groups."""
    groups = [group for group in torch.split(values, list(counts)) if len(group)]
    if len(groups) < 2:
        return None
    deviations = sum(float((group - values.mean()).sum()) ** 2 for group in groups)
    return math.sqrt(deviations * len(groups) / (len(groups) - 1)) / len(values)
