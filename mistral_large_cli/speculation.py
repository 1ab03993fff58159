"""Drafts on the command line: a smaller model or the prompt itself proposes tokens, and the model checks them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_large_conversion.checkpoint.layout import is_consolidated
from mistral_large_conversion.errors import SettingError

if TYPE_CHECKING:
    from modeling_mistral_large import MistralLargeTokenizer

Draft = Annotated[
    str | None, typer.Option(help="Smaller model of the same vocabulary that drafts tokens: folder or repository.")
]
DraftRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the draft's repository.")]
Lookup = Annotated[bool, typer.Option("--lookup", help="Draft tokens by looking them up in the prompt.")]
DraftTokens = Annotated[int | None, typer.Option(min=1, max=64, help="Most tokens drafted at a time.")]

# Where --draft-tokens does not say it: at a time, of prompt lookup and of vLLM's draft models.
LOOKUP_TOKENS, VLLM_DRAFT_TOKENS = 10, 4
# Tokens in a row that vLLM finds again in a prompt, the most and the fewest.
VLLM_MATCH = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}


@dataclass(frozen=True)
class Drafting:
    """What drafts tokens: the model `draft`, or without one prompt lookup.

    tokens: the most at a time, None for the usual number.
    hub: options for the draft's repository.
    """

    draft: str | None
    tokens: int | None = None
    hub: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        draft: str | None,
        lookup: bool,
        tokens: int | None,
        revision: str | None,
        hub: Mapping[str, Any],
    ) -> "Drafting | None":
        """Return what the options ask for, None where nothing drafts.

        hub: the options of `hub_options` for the model.

        Raises:
            SettingError: both kinds, or an option without effect.
        """
        if draft is not None and lookup:
            raise SettingError("--lookup with --draft: tokens are drafted by the one or by the other; leave one out")
        if tokens is not None and draft is None and not lookup:
            raise SettingError(
                "--draft-tokens: has no effect: nothing drafts tokens; leave it out, or pass --draft or --lookup"
            )
        if revision is not None and (draft is None or Path(draft).exists()):
            what = "there is no --draft" if draft is None else f"{draft} is a folder here"
            raise SettingError(
                f"--draft-revision: has no effect: {what}; leave it out, or name a repository as owner/name"
            )
        if draft is None:
            return cls(None, tokens) if lookup else None
        if Path(draft).exists():
            return cls(draft, tokens)
        own = {} if revision is None else {"revision": revision}
        return cls(draft, tokens, {**own, **{name: hub[name] for name in ("token", "cache_dir") if name in hub}})

    def check(self, model: str) -> None:
        """Refuse a draft whose folder has another vocabulary than that of the model, before weights are read.

        Raises:
            SettingError: such a draft.
        """
        from modeling_mistral_large.inference.speculative_decoding import different_vocabularies, vocabulary_of_folder

        own, other = vocabulary_of_folder(model), vocabulary_of_folder(self.draft or "")
        if own and other and own != other:
            raise different_vocabularies(own, other)

    def generate_options(self, model: Any, tokenizer: "MistralLargeTokenizer", **options: Any) -> dict[str, Any]:
        """Load the draft, if it is a model, and return options of `generate`; `options` are those of `load_model`.

        Raises:
            SettingError: its vocabulary is not that of the model.
        """
        from modeling_mistral_large.inference.speculative_decoding import (
            check_draft_vocabulary,
            different_vocabularies,
        )

        from .generation_session import load_model

        if self.draft is None:
            return {"prompt_lookup_num_tokens": self.tokens or LOOKUP_TOKENS}
        draft, drafts_tokenizer = load_model(self.draft, self.hub, **options)
        own, other = (f"the vocabulary of {each.vocabulary.name}" for each in (tokenizer, drafts_tokenizer))
        if own != other:
            raise different_vocabularies(own, other)
        check_draft_vocabulary(model, draft)
        if self.tokens is not None:
            draft.generation_config.num_assistant_tokens = self.tokens
        return {"assistant_model": draft}

    def vllm_options(self, model: str) -> tuple[str, ...]:
        """Return the options by which vLLM drafts so.

        Raises:
            SettingError: a draft that vLLM cannot load next to the model.
        """
        config: dict[str, Any]
        if self.draft is None:
            config = {"method": "ngram", "num_speculative_tokens": self.tokens or LOOKUP_TOKENS, **VLLM_MATCH}
        else:
            layouts = {
                name: "consolidated" if is_consolidated(Path(name)) else "HF"
                for name in (model, self.draft)
                if Path(name).is_dir()
            }
            if len(set(layouts.values())) > 1:
                raise SettingError(
                    f"--draft {self.draft}: {layouts[self.draft]} layout, and the model has the {layouts[model]} "
                    "layout; vLLM reads both in one layout; convert one of them with `mistral-large convert`"
                )
            config = {
                "method": "draft_model",
                "model": self.draft,
                "num_speculative_tokens": self.tokens or VLLM_DRAFT_TOKENS,
            }
            if "revision" in self.hub:
                config["revision"] = self.hub["revision"]
        return ("--speculative-config", json.dumps(config))
