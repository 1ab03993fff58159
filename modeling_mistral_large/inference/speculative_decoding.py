"""Speculative decoding: a draft proposes tokens, one forward of the model checks them all, and none is lost or changed.

    model.generate(**prompt, assistant_model=draft)
    model.generate(**prompt, prompt_lookup_num_tokens=10)

A drafted token is kept where it is the one that the model itself chooses there: the most likely one or, sampled, the
one of the same random numbers that plain `generate` draws for this token. So the response is that of `generate` without
a draft, sampled ones with the same seed too, as far as the model computes the same logits for several tokens at once.
"""

from contextvars import ContextVar, Token
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from mistral_large_conversion.errors import SettingError, TokenizerFileError
from mistral_large_conversion.folder_tokenizer import read_folder_tokenizer
from modeling_mistral_large.inference.chunked_prefill import ChunkedPrefillGenerationMixin
from modeling_mistral_large.inference.drafting import (
    LONGEST_MATCH,
    MOST_DRAFTED,
    DraftModel,
    PromptLookup,
    policy_for,
)
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.transformers_api.assisted import (
    UNSET_ASSISTANT_TOKENS,
    AssistedDecoding,
    AssistedHook,
    can_take_back,
    draft_settings,
    take_back,
)

_current: ContextVar["Speculation | None"] = ContextVar("speculation", default=None)


class Speculation:
    """What drafts have done in the calls of `generate` inside of a `with` block; keeps the draft's cache between them.

    proposed: drafted tokens. accepted: those of them that the model has chosen, too.
    written: tokens of responses. forwards: of the model, without those that read a prompt.
    """

    def __init__(self) -> None:
        self.restart()
        self._draft: DraftModel | None = None
        self._tokens: list[Token[Speculation | None]] = []

    @property
    def acceptance(self) -> float | None:
        """The share of the drafted tokens that were accepted, None where none was drafted."""
        return self.accepted / self.proposed if self.proposed else None

    def restart(self) -> None:
        """Count from 0 again."""
        self.proposed = self.accepted = self.written = self.forwards = 0

    def draft_model(self, model: Any, *, has_fp8_cache: bool) -> DraftModel:
        """Return the draft with what it has read, or a new one."""
        known = self._draft
        if known is None or known.model is not model or known.has_fp8_cache != has_fp8_cache:
            self._draft = known = DraftModel(model, has_fp8_cache=has_fp8_cache)
        return known

    def __enter__(self) -> "Speculation":
        self._tokens.append(_current.set(self))
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._tokens.pop())


def current_speculation() -> Speculation | None:
    """The `Speculation` whose `with` block this is, if it is one."""
    return _current.get()


class _TokenChoice:
    """The choice of a token at a place of the response: the same one for every model that gives the same scores.

    Sampling takes the largest of probabilities over exponential random numbers, as `torch.multinomial` does; each place
    has its own random numbers, drawn in order, so that drafts and how many there are change no response.
    """

    def __init__(self, decoding: AssistedDecoding) -> None:
        self._process = decoding.logits_processor
        self._is_sampled = bool(decoding.config.do_sample)
        self._device = decoding.input_ids.device
        self._noise: dict[int, Tensor] = {}
        self._drawn = 0

    def __call__(self, ids: Tensor, logits: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """Return the token [1] and the scores [1, vocab_size] after ids [1, tokens], of logits [1, vocab_size]."""
        scores: Tensor = self._process(ids, logits.to(copy=True, dtype=torch.float32, device=self._device))
        if not self._is_sampled:
            return scores.argmax(-1), scores
        probabilities = scores.softmax(-1)
        while self._drawn <= place:
            self._noise[self._drawn] = torch.empty_like(probabilities).exponential_()
            self._drawn += 1
        return (probabilities / self._noise[place]).argmax(-1), scores

    def after(self, ids: Tensor, written: int, drafted: list[int], logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same after ids of which `written` are the response's, and drafted tokens."""
        return self(with_tokens(ids, drafted), logits, written + len(drafted))

    def forget_before(self, place: int) -> None:
        for known in [known for known in self._noise if known < place]:
            del self._noise[known]


class SpeculativeGenerationMixin(ChunkedPrefillGenerationMixin, AssistedHook):
    """`generate` with a draft model or prompt lookup, as above, and with chunked prefill."""

    def check_draft(self, draft: Any, generation_config: GenerationConfig, options: dict[str, Any]) -> None:
        """Refuse a draft that cannot be used.

        Raises:
            SettingError: a draft with another vocabulary, two kinds of drafts, or options without effect.
        """
        if draft is None:
            return
        if generation_config.prompt_lookup_num_tokens is not None:
            raise SettingError(
                "prompt_lookup_num_tokens with assistant_model: tokens are drafted by the one or by the other; leave "
                "one of the two out"
            )
        check_draft_vocabulary(self, draft)
        if options.get("assistant_tokenizer") is not None:
            raise SettingError(
                "assistant_tokenizer: has no effect: a draft has the tokens of the model, and none are translated; "
                "leave it out"
            )

    def decode_with_draft(self, decoding: AssistedDecoding, draft: Any) -> Any:
        """Decode one sequence; `draft` is a model, or None for prompt lookup.

        Raises:
            SettingError: a batch, embeddings as the prompt, or a cache that cannot take tokens back.
        """
        cache, config = decoding.cache, decoding.config
        if decoding.input_ids.shape[0] > 1:
            raise SettingError(
                f"{decoding.input_ids.shape[0]} sequences with a draft: drafts are of one sequence; pass them one by "
                "one, or leave the draft out"
            )
        if decoding.reads_embeddings:
            raise SettingError("inputs_embeds with a draft: drafts are made of token ids; pass input_ids")
        if cache is None or not can_take_back(cache):
            raise SettingError(
                f"{'no cache' if cache is None else type(cache).__name__} with a draft: tokens that were drafted wrong "
                "have to be removed from the cache, which this one cannot; leave use_cache, cache_implementation and "
                "the cache out, or pass Fp8Cache"
            )
        speculation = _current.get() or Speculation()
        is_constant, is_recorded = False, getattr(cache, "is_recorded", False)
        if draft is None:
            most = int(config.prompt_lookup_num_tokens or 0)
            proposer: DraftModel | PromptLookup = PromptLookup(config.max_matching_ngram_size or LONGEST_MATCH)
        else:
            of_draft, is_constant, confidence = draft_settings(draft)
            given = config.num_assistant_tokens
            given = None if given == UNSET_ASSISTANT_TOKENS else given
            most = int(given or of_draft or MOST_DRAFTED)
            proposer = speculation.draft_model(draft, has_fp8_cache=isinstance(cache, Fp8Cache))
            proposer.least_confidence = confidence
            is_recorded = is_recorded and proposer.is_recorded
        keeps_scores = config.return_dict_in_generate and (config.output_scores or config.output_logits)
        policy = policy_for(self, draft, most, is_constant=is_constant, is_recorded=is_recorded)
        choose = _TokenChoice(decoding)
        ends = [] if config.eos_token_id is None else torch.tensor(config.eos_token_id).flatten().tolist()
        prompt_length = decoding.input_ids.shape[1]
        mask = decoding.attention_mask
        # A draft reads no padding.
        seen = decoding.input_ids if mask is None or mask.dim() != 2 else decoding.input_ids[mask.bool()]
        tokens: list[int] = seen.flatten().tolist()

        ids, scores_of, logits_of = decoding.input_ids, list[Tensor](), list[Tensor]()
        drafted: list[int] = []
        candidates, logits = ids, decoding.read_prompt()
        while True:
            start = ids.shape[1]
            chosen: list[tuple[Tensor, Tensor]] = []
            for number in range(len(drafted) + 1):
                row = logits[number : number + 1]
                chosen.append(choose(candidates[:, : start + number], row, start + number - prompt_length))
                if number < len(drafted) and int(chosen[-1][0]) != drafted[number]:
                    break
            accepted = len(chosen) - 1
            # Before anybody is told: what stops here leaves a cache of tokens that were chosen.
            take_back(cache, len(drafted) - accepted)
            policy.update(len(drafted), accepted)
            speculation.proposed += len(drafted)
            speculation.accepted += accepted
            for number, (token, scores) in enumerate(chosen):
                ids = torch.cat((ids, token[:, None]), dim=-1)
                tokens.append(int(token))
                if keeps_scores:
                    scores_of.append(scores)
                    logits_of.append(logits[number : number + 1].float())
                speculation.written += 1
                if decoding.streamer is not None:
                    decoding.streamer.put(token.cpu())
                is_done = bool(decoding.stopping_criteria(ids, tuple(scores_of) or None).all())
                if is_done:
                    take_back(cache, accepted - number)
                    break
            if is_done:
                break
            decoding.advance(len(chosen))
            written = ids.shape[1] - prompt_length
            choose.forget_before(written)
            # One token always comes after the drafted ones.
            count = min(policy.count(), max(0, config.max_length - ids.shape[1] - 1))
            drafted = proposer.propose(tokens, count, partial(choose.after, ids, written), ends) if count else []
            candidates = with_tokens(ids, drafted)
            logits = decoding.read_candidates(candidates, len(drafted))
            speculation.forwards += 1
        if decoding.streamer is not None:
            decoding.streamer.end()
        return decoding.result(ids, scores_of, logits_of)


def with_tokens(ids: Tensor, tokens: list[int]) -> Tensor:
    """Append tokens to ids [1, tokens]."""
    return torch.cat((ids, torch.tensor([tokens], dtype=ids.dtype, device=ids.device)), dim=-1)


def check_draft_vocabulary(model: Any, draft: Any) -> None:
    """Refuse a draft whose tokens are not those of the model, as far as configs and the folders they are of tell.

    Raises:
        SettingError: another number of tokens, or another vocabulary.
    """
    own, other = (each.config.get_text_config().vocab_size for each in (model, draft))
    if own != other:
        raise SettingError(
            f"the draft has {other} tokens, and the model {own}: a draft must have the vocabulary of the model; take "
            "another draft, such as Mistral-7B-Instruct-v0.3"
        )
    names = [vocabulary_of_folder(each.name_or_path) for each in (model, draft)]
    if names[0] != names[1] and all(names):
        raise different_vocabularies(*names)


def different_vocabularies(own: str | None, other: str | None) -> SettingError:
    """The error for a draft with another vocabulary than that of the model."""
    return SettingError(
        f"the draft has {other}, and the model {own}: a draft must have the vocabulary of the model; take another "
        "draft, for 2407 such as Mistral-7B-Instruct-v0.3"
    )


def vocabulary_of_folder(folder: str) -> str | None:
    """What the vocabulary of a folder is called in errors, None where there is no folder or no tokenizer in it."""
    if not folder or not Path(folder).is_dir():
        return None
    try:
        found = read_folder_tokenizer(Path(folder)).vocabulary
    except (TokenizerFileError, ValueError):
        return None
    return "a vocabulary that is none of the vendor's" if found is None else f"the vocabulary of {found}"
