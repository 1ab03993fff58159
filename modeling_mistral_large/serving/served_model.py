"""The model that is served: what a request becomes for its engine, and how the tokens of the response are read."""

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mistral_large_conversion.chat_templates import START_ANCHORS, response_format_of
from mistral_large_conversion.vocabulary import CONTROL_TOKENS
from modeling_mistral_large.errors import ConversationError, MissingLibraryError, SchemaError
from modeling_mistral_large.generation.structured_output import constrain
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

from .chat_request import LARGEST_SEED, ChatRequest
from .completion_text import CompletionReader
from .engine_thread import EngineThread
from .json_fields import RequestError
from .requests import GenerationRequest, TokenChoice

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

DEFAULT_MAX_TOKENS = 1024
# The most likely of fewer than 100,000 tokens is more likely than this. In sums of so many, rounding weighs more.
SMALLEST_TOP_P = 1e-5
# Without one of these a request leaves the choice between sampling and the most likely token to the folder.
ASK_FOR_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
OF_GENERATION_CONFIG = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Fields of generation_config.json that are read here, or that say nothing of which tokens are chosen.
READ_OF_GENERATION_CONFIG = frozenset(
    {
        *OF_GENERATION_CONFIG,
        *("do_sample", "suppress_tokens", "max_new_tokens", "max_length", "use_cache", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config", "cache_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict_in_generate", "prefill_chunk_size"),
    }
)
ROLES_OF_TEMPLATES = ("system", "developer", "user", "assistant", "tool")


class ServedModel:
    """A model with its tokenizer and engine, and the names it has in requests.

    names: the first is that of responses to requests without one.
    generation_config: the model's, which decides what requests leave open.
    context: the most tokens of prompt and response together.
    """

    def __init__(
        self,
        engine: EngineThread,
        tokenizer: MistralLargeTokenizer,
        *,
        names: Sequence[str],
        generation_config: Any,
        context: int,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.context = context
        self._of_model = read_generation_config(generation_config)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._skipped = frozenset(special | set(tokenizer.vocabulary.control_ids))

    def name_of(self, asked: str | None) -> str:
        """Return the name that a response has.

        Raises:
            RequestError: another model is asked for.
        """
        if asked is None:
            return self.names[0]
        if asked not in self.names:
            known = ", ".join(map(repr, self.names))
            raise RequestError(
                f"model: {asked!r} is not served here; the model is {known}; ask for it",
                "model",
                status=404,
                code="model_not_found",
            )
        return asked

    def prepare(self, request: ChatRequest) -> list[tuple[GenerationRequest, CompletionReader]]:
        """Return what the engine has to do for each choice of a request, and what reads its tokens.

        It takes milliseconds to seconds.

        Raises:
            RequestError: a conversation that the format refuses, too many tokens, or what the response cannot be held
                to.
        """
        try:
            prompt = self._prompt(request)
            max_tokens = self._max_tokens(request, len(prompt))
            choice = token_choice(request.sampling, self._of_model)
            if not request.tool_choice.callable_tools and request.tool_choice.mode == "none":
                choice = replace(
                    choice, logit_bias={**choice.logit_bias, CONTROL_TOKENS["[TOOL_CALLS]"]: -float("inf")}
                )
            self._check_logit_bias(request.sampling.get("logit_bias", {}))
            read = partial(
                CompletionReader,
                self.tokenizer.pieces,
                skipped=None if self._has_calls(prompt) else self._skipped,
                continues_text=request.continues_message and prompt[-1] not in self.tokenizer.vocabulary.control_ids,
                stops=request.stop,
                has_logprobs=request.top_logprobs is not None,
            )
            return [
                (
                    GenerationRequest(
                        prompt=prompt,
                        max_new_tokens=max_tokens,
                        choice=choice if not index else replace(choice, seed=_next_seed(choice.seed, index)),
                        constraint=self._constraint(request, prompt),
                        top_logprobs=request.top_logprobs,
                    ),
                    read(),
                )
                for index in range(request.n)
            ]
        except RecursionError as error:
            raise RequestError("the request: nested too deeply; make it flatter") from error

    def _prompt(self, request: ChatRequest) -> tuple[int, ...]:
        if self.tokenizer.prompt_format is None:
            for index, message in enumerate(request.messages):
                _check_message(message, f"messages[{index}]")
        tools = request.tool_choice.tools
        last_is_ours = request.continues_message
        try:
            ids = self.tokenizer.apply_chat_template(
                request.messages,
                tools=tools,
                add_generation_prompt=not last_is_ours,
                continue_final_message=last_is_ours,
                return_dict=False,
            )
        except ConversationError as error:
            raise RequestError(str(error), "tools" if str(error).startswith("tool") else "messages") from error
        return tuple(ids)

    def _max_tokens(self, request: ChatRequest, prompt_tokens: int) -> int:
        """Return the most tokens that a response may have."""
        if prompt_tokens >= self.context:
            raise RequestError(
                f"messages: {prompt_tokens} tokens; the model reads fewer than {self.context}; send less",
                "messages",
                code="context_length_exceeded",
            )
        room = self.context - prompt_tokens
        if request.max_tokens is not None and request.max_tokens > room:
            name = request.max_tokens_name
            raise RequestError(
                f"{name}: {request.max_tokens} after a prompt of {prompt_tokens} tokens; the context has "
                f"{self.context}; ask for at most {room}",
                name,
                code="context_length_exceeded",
            )
        own = self._of_model.get("max_new_tokens") or 0
        return request.max_tokens or min(room, max(own, DEFAULT_MAX_TOKENS))

    def _check_logit_bias(self, biases: Mapping[int, float]) -> None:
        size = len(self.tokenizer)
        for token in biases:
            if token >= size:
                raise RequestError(
                    f"logit_bias: no token has the id {token}; the vocabulary has {size}; correct it", "logit_bias"
                )

    def _has_calls(self, prompt: Sequence[int]) -> bool:
        """Return whether a response is one of our formats: a template of its own may end prompts otherwise."""
        tokenizer = self.tokenizer
        if tokenizer.prompt_format is not None:
            return True
        if response_format_of(tokenizer.response_template) is None:
            return False
        vocabulary = tokenizer.vocabulary
        return bool({vocabulary.control_tokens[anchor] for anchor in START_ANCHORS[vocabulary.name]} & {*prompt})

    def _constraint(self, request: ChatRequest, prompt: Sequence[int]) -> "LogitsProcessorList | None":
        choice = request.tool_choice
        if not request.is_json and not choice.is_constrained:
            return None
        parameter = "response_format" if request.is_json else "tool_choice"
        if self.tokenizer.prompt_format is None:
            raise RequestError(
                f"{parameter}: the model has a chat template of its own, whose responses cannot be held to a form; "
                "leave it out",
                parameter,
            )
        make = partial(
            constrain,
            self.tokenizer,
            response_format=request.response_format,
            tools=choice.callable_tools,
            tool_choice=choice.mode,
            parallel_tool_calls=choice.is_parallel,
            continue_final_message=request.continues_message,
        )
        try:
            if request.continues_message:
                # Whether the response can begin so is known with its first token, when a stream has been promised.
                # transformers types ids as tensors of a kind that nothing makes.
                ids: Any = torch.tensor([prompt])
                scores: Any = torch.zeros(1, len(self.tokenizer))
                make()(ids, scores)
            return make()
        except (ConversationError, SchemaError, MissingLibraryError) as error:
            raise RequestError(str(error), parameter) from error


def read_generation_config(config: Any) -> dict[str, Any]:
    """Return what a generation config says, and warn of what has no effect in this server."""
    given: dict[str, Any] = json.loads(config.to_json_string(ignore_metadata=True))
    without_effect = sorted(name for name, value in given.items() if value and name not in READ_OF_GENERATION_CONFIG)
    if without_effect:
        warnings.warn(
            f"generation_config.json: {', '.join(without_effect)}: no effect in this server; leave it out",
            stacklevel=2,
        )
    return given


def token_choice(asked: Mapping[str, Any], of_model: Mapping[str, Any]) -> TokenChoice:
    """Return how tokens are chosen for a request; what it leaves open is the folder's, read from `of_model`."""
    samples = of_model.get("do_sample") or any(name in asked for name in ASK_FOR_SAMPLING)
    names = OF_GENERATION_CONFIG if samples else ("repetition_penalty",)
    own = {name: of_model[name] for name in names if of_model.get(name) is not None}
    settings = {**own, **asked}
    if not samples:
        settings["temperature"] = 0.0
    if settings.get("top_p", 1.0) <= SMALLEST_TOP_P:
        settings["temperature"] = 0.0
    if settings.get("temperature") == 0:
        # They only thin out what would be drawn from.
        for name in ("top_p", "top_k", "min_p"):
            settings.pop(name, None)
    if "seed" in settings:
        settings["seed"] %= LARGEST_SEED + 1
    suppressed = {token: -float("inf") for token in of_model.get("suppress_tokens") or ()}
    return TokenChoice(**{**settings, "logit_bias": {**settings.get("logit_bias", {}), **suppressed}})


def _next_seed(seed: int | None, index: int) -> int | None:
    """Return the seed of another choice, which would be the same response with the first one's."""
    return None if seed is None else (seed + index) % (LARGEST_SEED + 1)


def _check_message(message: Any, where: str) -> None:
    """Refuse what a chat template of its own would render or drop: unknown roles, images, values that are no text.

    Raises:
        RequestError: such a message.
    """
    if not isinstance(message, dict):
        raise RequestError(f"{where}: must be an object with a role and a content; correct it", "messages")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES_OF_TEMPLATES:
        raise RequestError(f"{where}: role {role!r}; the roles are {', '.join(ROLES_OF_TEMPLATES)}", "messages")
    chunks = content if isinstance(content, list) else []
    are_texts = all(
        isinstance(chunk, dict) and chunk.get("type") == "text" and isinstance(chunk.get("text"), str)
        for chunk in chunks
    )
    if not are_texts or not (content is None or isinstance(content, str | list)):
        raise RequestError(
            f"{where}: content must be text or a list of text chunks, which is all that this model reads", "messages"
        )
