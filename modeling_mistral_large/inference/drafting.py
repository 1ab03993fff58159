"""Who proposes tokens to a model, a smaller one or the prompt itself, and how many at a time."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from mistral_large_conversion.sharding.memory import PREFILL_CHUNK
from modeling_mistral_large.inference.common_prefix import common_length
from modeling_mistral_large.inference.cpu_decode import uses_vector_products
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.transformers_api.caches import keep_first
from modeling_mistral_large.transformers_api.keywords import cache_argument

# Tokens drafted at a time, where nobody says how many; of prompt lookup `prompt_lookup_num_tokens` says it.
MOST_DRAFTED = 8
# Tokens in a row that prompt lookup finds again, where `max_matching_ngram_size` says nothing.
LONGEST_MATCH = 3
# What one more token in a forward costs of a step that reads all weights: products of few rows on a CPU and on a GPU.
ROW_COST = {"cpu": 0.05, "cuda": 0.01}
# What checking any drafted token costs where a step of one is matrix times vector, as a share of such a step.
VECTOR_GAIN = 0.8
# What calling a draft costs beyond the weights that it reads.
CALL_COST = 0.02

# The choice of the token [1] after drafted ones, and its scores [1, vocab_size], from logits [1, vocab_size].
Choose = Callable[[list[int], Tensor], tuple[Tensor, Tensor]]


class DraftPolicy:
    """How many tokens to draft: as many as pay by what was accepted lately; none where none pay, with a try at times.

    Costs are shares of a step of the model. It counts and measures no time, so that it does the same in every rank
    and in every run.

    most: tokens drafted at once. is_constant: always this number.
    draft_cost: of a drafted token. row_cost: of checking one more token. first_row_cost: of checking any at all.
    """

    # Of what was seen before, each tried token leaves this share.
    MEMORY = 0.9
    # Before anything is seen: half of one token.
    PRIOR = (0.5, 1.0)
    # Less of a gain is none.
    LEAST_GAIN = 1.02
    FIRST_WAIT, LONGEST_WAIT = 8, 64

    def __init__(
        self, most: int, *, draft_cost: float, row_cost: float, first_row_cost: float = 0.0, is_constant: bool = False
    ) -> None:
        self._most, self._is_constant = most, is_constant
        self._cost, self._first_row_cost = draft_cost + row_cost, first_row_cost
        self._accepted, self._tried = self.PRIOR
        self._wait, self._left, self._is_trying = self.FIRST_WAIT, 0, False

    def count(self) -> int:
        """Return how many tokens to draft for the next forward."""
        if self._is_constant:
            return self._most
        if self._left:
            self._left -= 1
            self._is_trying = not self._left
            if self._left:
                return 0
        if self._is_trying:
            # Prompt lookup may have nothing to try.
            return min(1, self._most)
        counts = range(1, self._most + 1)
        best = max(counts, key=self._gain, default=0)
        if best and self._gain(best) >= self.LEAST_GAIN:
            return best
        self._left, self._wait = self._wait, min(2 * self._wait, self.LONGEST_WAIT)
        # One that succeeds after the pause counts more than all before it.
        self._accepted, self._tried = 0.0, 1.0
        return 0

    def _gain(self, count: int) -> float:
        """How much faster the model is with this number of drafted tokens, at the rate of acceptance of late."""
        rate = self._accepted / self._tried
        tokens = sum(rate**number for number in range(count + 1))
        return tokens / (1 + self._first_row_cost + count * self._cost)

    def update(self, proposed: int, accepted: int) -> None:
        """Take note of how many of the proposed tokens were accepted; those after the first wrong one tell nothing."""
        if proposed:
            self._is_trying = False
        for number in range(min(accepted + 1, proposed)):
            self._accepted = self.MEMORY * self._accepted + (number < accepted)
            self._tried = self.MEMORY * self._tried + 1
        if accepted:
            self._wait = self.FIRST_WAIT


def tensor_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def policy_for(model: Any, draft: Any, most: int, *, is_constant: bool, is_recorded: bool = False) -> DraftPolicy:
    """The policy of a model and its draft, a model or None.

    is_recorded: whether the steps of both are, so that they take the time of reading their weights.
    """
    device = model.device.type
    draft_cost = 0.0
    if draft is not None:
        draft_cost = tensor_bytes(draft) / max(1, tensor_bytes(model))
        if device != "cpu" and not is_recorded:
            # Steps that are not recorded take the time of their launches, the same in every layer.
            draft_cost = max(draft_cost, draft.config.num_hidden_layers / model.config.num_hidden_layers)
        draft_cost += CALL_COST
    first_row_cost = VECTOR_GAIN if uses_vector_products(model) else 0.0
    row_cost = ROW_COST.get(device, ROW_COST["cuda"])
    return DraftPolicy(
        most, draft_cost=draft_cost, row_cost=row_cost, first_row_cost=first_row_cost, is_constant=is_constant
    )


class DraftModel:
    """A smaller model with the same tokens. Its cache keeps what two proposals, or two prompts, have in common.

    least_confidence: no token is drafted after one that the draft gives less probability.
    """

    def __init__(self, model: Any, *, has_fp8_cache: bool) -> None:
        self.model = model
        self.has_fp8_cache = has_fp8_cache
        self.least_confidence = 0.0
        self._forget()

    def _forget(self) -> None:
        session_cache = getattr(self.model, "session_cache", None)
        if session_cache is not None:
            # On a GPU one of recorded steps.
            self._cache: Cache = session_cache("fp8" if self.has_fp8_cache else "bf16")
        else:
            # Without its config, a cache keeps what a sliding window would drop, and what may be asked for again.
            self._cache = Fp8Cache(self.model.config) if self.has_fp8_cache else DynamicCache()
        self._read: list[int] = []

    @property
    def is_recorded(self) -> bool:
        """Whether its steps are recorded."""
        return getattr(self._cache, "is_recorded", False)

    @torch.no_grad()
    def propose(self, ids: Sequence[int], count: int, choose: Choose, ends: Sequence[int]) -> list[int]:
        """Return up to `count` tokens to come after `ids`, fewer behind one of `ends` or the draft's context."""
        room = self.model.config.max_position_embeddings - len(ids)
        proposed: list[int] = []
        unread = self._forget_other(ids)
        for _ in range(min(count, room)):
            token, scores = choose(proposed, self._logits(unread))
            proposed.append(int(token))
            if proposed[-1] in ends:
                break
            if self.least_confidence and float(scores.softmax(-1)[0, proposed[-1]]) < self.least_confidence:
                break
            unread = [proposed[-1]]
        return proposed

    def _forget_other(self, ids: Sequence[int]) -> list[int]:
        """Remove what is not the beginning of `ids` from the cache; return what it lacks, one token at least."""
        known = min(common_length(self._read, list(ids)), len(ids) - 1)
        keep_first(self._cache, known)
        self._read = self._read[:known]
        return list(ids[known:])

    def _logits(self, unread: list[int]) -> Tensor:
        """Read tokens in chunks and return the logits [1, vocab_size] after them."""
        for start in range(0, len(unread), PREFILL_CHUNK):
            chunk = unread[start : start + PREFILL_CHUNK]
            inputs = torch.tensor([chunk], device=self.model.device)
            try:
                output = self.model(inputs, use_cache=True, logits_to_keep=1, **cache_argument(self._cache))
            except BaseException:
                # Some layers have cached the chunk, and some have not.
                self._forget()
                raise
            self._read += chunk
        logits: Tensor = output.logits[:, -1]
        return logits


class PromptLookup:
    """Tokens that came after the same last tokens earlier in the sequence: the longest match, and of these the last."""

    def __init__(self, longest_match: int) -> None:
        self._longest = longest_match
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, ids: Sequence[int], count: int, choose: Choose, ends: Sequence[int]) -> list[int]:
        """Return up to `count` tokens to come after `ids`, none where the last token has not been there before."""
        # The last tokens are indexed once something comes after them.
        for end in range(self._indexed + 1, len(ids)):
            for length in range(1, min(self._longest, end) + 1):
                self._after[tuple(ids[end - length : end])] = end
        self._indexed = max(self._indexed, len(ids) - 1)
        for length in range(min(self._longest, len(ids)), 0, -1):
            start = self._after.get(tuple(ids[len(ids) - length :]))
            if start is not None:
                found = list(ids[start : start + count])
                end = next((number + 1 for number, token in enumerate(found) if token in ends), len(found))
                return found[:end]
        return []
