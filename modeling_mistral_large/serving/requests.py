"""What the routes of the server ask of its batching engine, and what it gives back: token ids, and nothing of HTTP."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transformers import LogitsProcessorList

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenChoice:
    """How the tokens of one response are chosen, greedily at a temperature of 0.

    top_k: 0 for all tokens.
    frequency_penalty, presence_penalty: as OpenAI's API has them, over the tokens of the response.
    repetition_penalty: as transformers has it, over prompt and response.
    logit_bias: added to the logits of token ids.
    seed: None for one that is drawn.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """A response to be generated.

    prompt: token ids, fewer than the model's context.
    max_new_tokens: the most tokens of the response; prompt and response fit the context together.
    constraint: of `constrain`, made for this request alone.
    top_logprobs: how many of the most likely tokens are returned with each token; None for no log probabilities.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    choice: TokenChoice = TokenChoice()
    constraint: LogitsProcessorList | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class GeneratedToken:
    """A token of a response, with natural log probabilities of the model's own distribution where they were asked for.

    The model's own: before temperature, penalties, biases and constraints.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
