"""A chat that reads each token of its conversation once: model, tokenizer and KV cache stay from turn to turn."""

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from modeling_mistral_large.errors import ConversationError, SettingError
from modeling_mistral_large.inference.common_prefix import common_length
from modeling_mistral_large.inference.speculative_decoding import Speculation, current_speculation
from modeling_mistral_large.instruct.answer import AnswerEvent, AnswerStream
from modeling_mistral_large.recorded_steps.automatic import session_cache
from modeling_mistral_large.transformers_api.assisted import can_take_back
from modeling_mistral_large.transformers_api.caches import capacity, keep_first
from modeling_mistral_large.transformers_api.keywords import CACHE_NAMES, cache_argument

# Of a response, where neither the call nor the model's generation config says it.
MAX_NEW_TOKENS = 1024
# Of `generate`, and the session's own: the prompt is the conversation's, and one sequence goes with the cache.
OWN_OPTIONS = frozenset(
    {
        *("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids"),
        *("use_cache", "cache_implementation", "return_dict_in_generate", *CACHE_NAMES),
    }
)
ONE_SEQUENCE = ("num_beams", "num_return_sequences")


class ChatSession:
    """A model that responds to conversations with what its cache holds of the one before.

        session = ChatSession(model, tokenizer)
        messages.append(session.respond(messages, tools, max_new_tokens=256, do_sample=False))

    Each prompt is rendered whole, as the format moves the system text and the tools to the last user message; the
    cache keeps what it has in common with the last one, and the rest is read in chunks. So a response is that of a
    fresh `generate`, whatever was edited, dropped, broken off or stopped before. For one thread at a time; `stop` may
    be called from any.

    cache: an empty cache for one sequence, also of recorded steps, in FP8 or static; None makes one, of recorded steps
        where the model can record.

    Attributes:
        prompt_tokens: of the last prompt. reused_tokens: those of them that were not read again.
        response_tokens: of the last response, its end included. was_stopped: whether `stop` ended it.
        speculation: what drafts (`assistant_model`, `prompt_lookup_num_tokens`) have done in the last response.

    Raises:
        SettingError: a cache that is not empty, or one that no tokens can be taken off.
    """

    def __init__(self, model: Any, tokenizer: Any, cache: Cache | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.cache = session_cache(model) if cache is None else cache
        if not can_take_back(self.cache):
            raise SettingError(
                f"{type(self.cache).__name__}: no tokens can be taken off this cache, and prompts differ from each "
                "other; pass another cache, or none"
            )
        if int(self.cache.get_seq_length()):
            raise SettingError(
                f"{type(self.cache).__name__}: holds {int(self.cache.get_seq_length())} tokens that the session does "
                "not know; pass an empty cache, or none"
            )
        self.prompt_tokens = self.reused_tokens = self.response_tokens = 0
        self.was_stopped = False
        self.speculation = Speculation()
        self._cached: list[int] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the last prompt and response the cache holds."""
        return len(self._cached)

    @property
    def context_length(self) -> int:
        """How many tokens a prompt and its response can have together."""
        of_cache = capacity(self.cache)
        of_model = int(self.model.config.max_position_embeddings)
        return of_model if of_cache is None else min(of_model, of_cache)

    def prompt(
        self, messages: Sequence[Any], tools: Sequence[Any] | None = None, *, continue_final_message: bool = False
    ) -> list[int]:
        """Return the ids of the prompt of a conversation."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools or ()) or None,
            continue_final_message=continue_final_message,
            return_dict=False,
        )
        return ids

    def respond(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None = None,
        *,
        continue_final_message: bool = False,
        on_event: Callable[[AnswerEvent], None] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        rng: random.Random | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return the assistant's next message; `options` are those of `generate`, a streamer too.

        continue_final_message: the last message is the assistant's, and the response goes on with its text.
        on_event: called with each piece of text and each complete tool call as they come.
        on_prefill: called with the tokens read so far and those of the prompt, before each chunk and at the end.
        rng: where the ids of tool calls without one come from.

        A response that is stopped calls no tools.

        Raises:
            ConversationError: no prompt can hold the conversation, or it leaves no room for a response.
            SettingError: an option that is the session's own, or a call while another one runs.
        """
        prompt = self.prompt(messages, tools, continue_final_message=continue_final_message)
        goes_on = prompt[-1] not in self.tokenizer.vocabulary.control_ids
        stream = AnswerStream(self.tokenizer.pieces, continues_text=goes_on, rng=rng)
        show = on_event or (lambda _: None)

        def take(ids: list[int]) -> None:
            for event in stream.feed(ids):
                show(event)

        self.generate(prompt, on_tokens=take, on_prefill=on_prefill, **options)
        for event in stream.finish():
            show(event)
        message = stream.parsed.message
        if self.was_stopped:
            message.pop("tool_calls", None)
        return message

    def generate(
        self,
        prompt: Sequence[int],
        *,
        on_tokens: Callable[[list[int]], None] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> list[int]:
        """Return the ids that come after those of a prompt: what `respond` is made of."""
        options = self._checked(prompt, options)
        if not self._lock.acquire(blocking=False):
            raise SettingError(
                "this ChatSession writes another response, and its cache is of one conversation; wait for it, or make "
                "a session for each"
            )
        try:
            self._stop.clear()
            return self._generate(list(prompt), on_tokens, on_prefill, streamer, options)
        finally:
            self._lock.release()

    def stop(self) -> None:
        """End the response that is written, before its next token or the prompt's next chunk."""
        self._stop.set()

    def reset(self) -> None:
        """Empty the cache: for weights that have changed."""
        keep_first(self.cache, 0)
        self._cached = []

    def _checked(self, prompt: Sequence[int], options: dict[str, Any]) -> dict[str, Any]:
        """Return the options of `generate` with the number of tokens there is room for."""
        if refused := sorted(OWN_OPTIONS & set(options)):
            raise SettingError(f"{refused[0]}: is the ChatSession's own; leave it out, or call the model's generate")
        config: GenerationConfig = options.get("generation_config") or self.model.generation_config
        for name in ONE_SEQUENCE:
            if options.get(name, getattr(config, name, None)) not in (None, 1):
                raise SettingError(f"{name}: a ChatSession writes one sequence; pass 1, or call the model's generate")
        room = self.context_length - len(prompt)
        if room < 1:
            raise ConversationError(
                f"the conversation has {len(prompt)} tokens; the model reads fewer than {self.context_length}; leave "
                "out messages"
            )
        longest = options.pop("max_length", config.max_length)
        wanted = options.pop("max_new_tokens", config.max_new_tokens)
        if wanted is None:
            wanted = MAX_NEW_TOKENS if longest is None else longest - len(prompt)
        if options.get("stop_strings") is not None:
            options.setdefault("tokenizer", self.tokenizer)
        return {**options, "max_new_tokens": min(wanted, room)}

    def _generate(
        self,
        prompt: list[int],
        on_tokens: Callable[[list[int]], None] | None,
        on_prefill: Callable[[int, int], None] | None,
        streamer: Any,
        options: dict[str, Any],
    ) -> list[int]:
        self._keep_prefix(prompt)
        response = _Response(self, prompt, on_tokens, on_prefill, streamer)
        input_ids = torch.tensor([prompt], device=self.model.device)
        try:
            # A caller's own counts what drafts do here.
            with nullcontext() if current_speculation() else self.speculation:
                self.model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    streamer=response,
                    use_cache=True,
                    **cache_argument(self.cache),
                    **options,
                )
        except _StoppedError:
            pass
        finally:
            response.hook.remove()
            self.was_stopped, self.response_tokens = self._stop.is_set(), len(response.written)
            self._cached = [*prompt, *response.written][: response.read]
            # What was drafted, or read by some layers only, before an error or an interrupt.
            keep_first(self.cache, len(self._cached))
        return response.written

    def _keep_prefix(self, prompt: list[int]) -> None:
        """Take off the cache what is not the beginning of a prompt."""
        # Its own tokens, or none if somebody else has used it.
        known = self._cached if int(self.cache.get_seq_length()) == len(self._cached) else []
        # The last token of a prompt is always read, as its logits are wanted.
        common = min(common_length(known, prompt), len(prompt) - 1)
        keep_first(self.cache, common)
        self._cached = prompt[:common]
        self.prompt_tokens, self.reused_tokens, self.response_tokens = len(prompt), common, 0
        self.speculation.restart()


class _StoppedError(Exception):
    """The session was told to stop."""


class _Response(BaseStreamer):
    """A response while it is written; `read` is how many tokens of prompt and response all layers have cached."""

    def __init__(
        self,
        session: ChatSession,
        prompt: list[int],
        on_tokens: Callable[[list[int]], None] | None,
        on_prefill: Callable[[int, int], None] | None,
        streamer: Any,
    ) -> None:
        self._session, self._prompt, self._streamer = session, prompt, streamer
        self._on_tokens, self._on_prefill = on_tokens, on_prefill
        self._is_prompt = True
        self.written: list[int] = []
        self.read = session.cached_tokens
        self.hook = session.model.register_forward_pre_hook(self._before_chunk)

    def _before_chunk(self, *_: Any) -> None:
        """Between two chunks of a prompt, all layers have cached the same tokens."""
        self.read = int(self._session.cache.get_seq_length())
        if self._on_prefill is not None:
            self._on_prefill(self.read, len(self._prompt))
        self._end_if_stopped()

    def _end_if_stopped(self) -> None:
        if self._session._stop.is_set():
            raise _StoppedError

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
        else:
            if not self.written:
                self.hook.remove()
                self.read = len(self._prompt)
                if self._on_prefill is not None:
                    self._on_prefill(self.read, self.read)
            self._end_if_stopped()
            ids = value.flatten().tolist()
            self.written.extend(ids)
            # The last token that was written has not been read yet.
            self.read = len(self._prompt) + len(self.written) - 1
            if self._on_tokens is not None:
                self._on_tokens(ids)
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
