"""The next token of each row of a batch, chosen as the row's own request wants it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from modeling_mistral_large.errors import GenerationError
from modeling_mistral_large.serving.requests import GeneratedToken, GenerationRequest, TokenChoice

# Below it logits are not divided by the temperature, which would overflow: the most likely token is taken.
LEAST_TEMPERATURE = 1e-5


class TokenPenalty(LogitsProcessor):
    """OpenAI's penalties: scores fall with the count of a token in the response, and by a fixed part if it is there."""

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override, unused-ignore]
        """Return the scores of the next tokens [rows, vocabulary] after prompts and responses [rows, tokens]."""
        written = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, written, torch.ones_like(written, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0).to(scores.dtype)


def is_greedy(choice: TokenChoice) -> bool:
    """Whether the most likely token is taken each time."""
    return choice.temperature < LEAST_TEMPERATURE


def processors_for(request: GenerationRequest) -> LogitsProcessorList:
    """What a request does to the scores of its row, in the order of `generate`; the constraint has the last word."""
    choice = request.choice
    processors = LogitsProcessorList()
    if choice.logit_bias:
        bias = {(token,): float(value) for token, value in choice.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(bias))  # type: ignore[arg-type]  # a table works, too
    if choice.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(choice.repetition_penalty)))
    if choice.frequency_penalty or choice.presence_penalty:
        processors.append(TokenPenalty(len(request.prompt), choice.frequency_penalty, choice.presence_penalty))
    processors.extend(request.constraint or ())
    return processors


def warpers_for(choice: TokenChoice) -> LogitsProcessorList:
    """What a choice does to the scores before a token is drawn, for all rows that are drawn alike."""
    warpers = LogitsProcessorList()
    if is_greedy(choice):
        return warpers
    if choice.temperature != 1.0:
        warpers.append(TemperatureLogitsWarper(float(choice.temperature)))
    if choice.top_k:
        warpers.append(TopKLogitsWarper(choice.top_k))
    if choice.top_p < 1.0:
        warpers.append(TopPLogitsWarper(float(choice.top_p)))
    if choice.min_p:
        warpers.append(MinPLogitsWarper(float(choice.min_p)))
    return warpers


class TokenChooser:
    """The choices of one response: its processors, its random numbers, and its tokens where the processors read them.

    device: of the logits.

    Raises ValueError for a setting that no token can be chosen by.
    """

    def __init__(self, request: GenerationRequest, device: torch.device) -> None:
        choice = request.choice
        self.top_logprobs = request.top_logprobs
        self.processors, self.warpers = processors_for(request), warpers_for(choice)
        self.is_greedy = is_greedy(choice)
        # Rows that are alike in this are warped together.
        self.kind = None if self.is_greedy else (choice.temperature, choice.top_k, choice.top_p, choice.min_p)
        self.generator: torch.Generator | None = None
        if not self.is_greedy:
            self.generator = torch.Generator(device)
            if choice.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(choice.seed)
        self._ids = torch.empty(1, 0, dtype=torch.long, device=device)
        self._length = len(request.prompt)
        if self.processors:
            tokens = torch.tensor([request.prompt], dtype=torch.long, device=device)
            self._ids = torch.cat((tokens, tokens.new_empty(1, request.max_new_tokens)), dim=1)

    def process(self, logits: Tensor) -> Tensor:
        """Return the scores [1, vocabulary] in float32 for the logits, before they are warped."""
        # A copy, as processors may write to it.
        scores = logits.to(torch.float32, copy=True)
        for processor in self.processors:
            scores = processor(self._ids[:, : self._length], scores)  # type: ignore[arg-type, unused-ignore]
        return scores

    def append(self, token: int) -> None:
        """Note a token of the response."""
        if self.processors:
            self._ids[0, self._length] = token
            self._length += 1


def choose_tokens(logits: Tensor, choosers: Sequence[TokenChooser]) -> list[GeneratedToken | Exception]:
    """Choose the next token of each row of logits [rows, vocabulary]; an error is that of its row alone."""
    results: list[GeneratedToken | Exception | None] = [None] * len(choosers)
    processed: dict[int, Tensor] = {}
    kinds: dict[object, list[int]] = defaultdict(list)
    for row, chooser in enumerate(choosers):
        try:
            if chooser.processors:
                processed[row] = chooser.process(logits[row : row + 1])
        # Whatever a constraint raises is for its request to tell.
        except Exception as error:
            results[row] = error
        else:
            kinds[chooser.kind].append(row)
    for rows in kinds.values():
        first = choosers[rows[0]]
        scores = _scores_of(rows, logits, processed)
        if first.is_greedy:
            best = scores.max(dim=-1)
            tokens, marks = best.indices.tolist(), best.values
        else:
            tokens, marks = _drawn(scores, [choosers[row] for row in rows])
        for row, token, is_number in zip(rows, tokens, marks.isfinite().tolist(), strict=True):
            results[row] = described(token, logits[row], choosers[row]) if is_number else no_choice()
    for chooser, result in zip(choosers, results, strict=True):
        if isinstance(result, GeneratedToken):
            chooser.append(result.id)
    return [result for result in results if result is not None]


def _scores_of(rows: list[int], logits: Tensor, processed: dict[int, Tensor]) -> Tensor:
    """The processed scores of some rows, the logits of those that have no processor."""
    if not processed:
        return logits if len(rows) == len(logits) else logits[rows]
    return torch.cat([processed[row] if row in processed else logits[row : row + 1].float() for row in rows])


def _drawn(scores: Tensor, choosers: Sequence[TokenChooser]) -> tuple[list[int], Tensor]:
    """Draw a token of each row with the random numbers of its response; also a probability of each, to see it is one.

    A row with NaN, with infinity or without a finite score has NaN for all probabilities.
    """
    scores = scores.to(torch.float32, copy=True)
    no_ids = torch.empty(len(choosers), 0, dtype=torch.long, device=scores.device)
    for warper in choosers[0].warpers:
        scores = warper(no_ids, scores)  # type: ignore[arg-type, unused-ignore]
    probabilities = scores.softmax(dim=-1)
    marks = probabilities[:, 0]
    # multinomial refuses NaN, on a GPU by ending the process's use of it.
    drawable = probabilities.nan_to_num(nan=1.0)
    drawn = [
        torch.multinomial(row, 1, generator=chooser.generator)
        for row, chooser in zip(drawable.unbind(), choosers, strict=True)
    ]
    return torch.cat(drawn).tolist(), marks


def described(token: int, logits: Tensor, chooser: TokenChooser) -> GeneratedToken:
    """A chosen token, with what the model itself thinks of it where that was asked for; logits are [vocabulary]."""
    if chooser.top_logprobs is None:
        return GeneratedToken(token)
    logprobs = logits.float().log_softmax(dim=-1)
    most = logprobs.topk(chooser.top_logprobs)
    top = tuple(zip(most.indices.tolist(), most.values.tolist(), strict=True))
    return GeneratedToken(token, float(logprobs[token]), top)


def no_choice() -> GenerationError:
    return GenerationError(
        "the response: no token can be chosen, as all scores are -inf, or some are NaN or infinite; check the weights, "
        "and loosen logit_bias and constraints"
    )
