"""A generation session: a model with its cache and, under `torchrun`, its ranks.

The first rank is the caller's; it sends every prompt to the others, which only generate.
"""

import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from .conversation_file import Message
from .speculation import Drafting, DraftMeter
from .terminal import printable
from .tools_file import Tool

if TYPE_CHECKING:
    from modeling_mistral_large import MistralLargeTokenizer

# Logits divided by less overflow.
SMALLEST_TEMPERATURE = 0.001


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at a temperature of 0.

    seed: also of the ids of tool calls that the model leaves without one.

    Raises:
        SettingError: a temperature that logits cannot be divided by, or a top_p without effect.
    """

    max_new_tokens: int
    temperature: float
    top_p: float | None
    seed: int | None

    def __post_init__(self) -> None:
        from mistral_large_conversion.errors import SettingError

        if not (self.temperature == 0 or SMALLEST_TEMPERATURE <= self.temperature < math.inf):
            raise SettingError(
                f"temperature {self.temperature}: must be finite, and 0 or at least {SMALLEST_TEMPERATURE}; 0 takes "
                "the most likely token each time"
            )
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise SettingError(f"top_p {self.top_p}: must be a probability, from 0 to 1; leave it out for 1")
        if self.temperature == 0 and self.top_p is not None:
            raise SettingError(
                "top_p: has no effect at a temperature of 0, which takes the most likely token each time; leave one of "
                "the two out"
            )

    def options(self) -> dict[str, Any]:
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        top_p = 1.0 if self.top_p is None else self.top_p
        return {"do_sample": True, "temperature": self.temperature, "top_p": top_p, "top_k": 0}


class GenerationSession:
    """A model with its cache: the prefix that two prompts have in common is computed once.

    hub: the options of `hub_options`.
    dtype: of the weights, as torch names it, or auto.
    adapter: folder or repository of a LoRA to be loaded on the model.
    drafting: what drafts tokens for the model.
    """

    def __init__(
        self,
        model_name: str,
        sampling: Sampling,
        *,
        dtype: str = "auto",
        device_map: str | None = None,
        kv: str = "auto",
        prefill_chunk: int,
        hub: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        drafting: Drafting | None = None,
    ) -> None:
        import torch
        import transformers

        from mistral_large_conversion.checkpoint.names import expected_tensors
        from modeling_mistral_large.recorded_steps.automatic import session_cache

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._is_parallel = is_parallel()
        self.is_first = int(os.environ.get("RANK", "0")) == 0
        if not self.is_first:
            transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        place = {"tp_plan": "auto"} if self._is_parallel else {"device_map": device_map or "auto"}
        if drafting is not None:
            drafting.check(model_name)
        self._model, self.tokenizer = load_model(model_name, hub or {}, adapter=adapter, dtype=dtype, **place)
        self._draft_options: dict[str, Any] = {}
        self.meter: DraftMeter | None = None
        if drafting is not None:
            self._draft_options = drafting.generate_options(
                self._model, self.tokenizer, load_model, dtype=dtype, **place
            )
            self.meter = DraftMeter()
        self._sampling = sampling
        config = self._model.config
        self._cache: Any = session_cache(self._model, "fp8" if kv == "fp8" else "bf16")
        self._cached: list[int] = []
        self._prefill_chunk = prefill_chunk
        self._random = torch.Generator()
        if sampling.seed is not None:
            self._random.manual_seed(sampling.seed)
        else:
            self._random.seed()
        parameters = sum(math.prod(tensor.shape) for tensor in expected_tensors(config))
        self.description = (
            f"{model_name}: {parameters / 1e9:,.3g} B parameters, {self._model.dtype}, {self._model.device}"
        )

    @property
    def prompt_formats(self) -> tuple[str, ...]:
        """The instruct format of the model's prompts; none where they are what a template of its own renders."""
        prompt_format: str | None = self.tokenizer.prompt_format
        return () if prompt_format is None else (prompt_format,)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Return the ids of a prompt."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, return_dict=False
        )
        return ids

    def respond(
        self, messages: Sequence[Message], tools: Sequence[Tool], show: Callable[[Any], None]
    ) -> tuple[Message, bool]:
        """Generate the next message, hand its events to `show` as they come, and return it and whether it was stopped.

        A response that was stopped calls no tools.
        """
        import torch

        from mistral_large_conversion.errors import ConversationError
        from modeling_mistral_large.instruct.answer import AnswerStream

        prompt = self.prompt(messages, tools)
        limit = self._model.config.max_position_embeddings
        if len(prompt) >= limit:
            raise ConversationError(
                f"the conversation has {len(prompt)} tokens; the model reads fewer than {limit}; /reset starts anew"
            )
        seed = int(torch.randint(2**31, (1,), generator=self._random))
        stream = AnswerStream(self.tokenizer.pieces, rng=random.Random(seed))

        if self.meter is not None:
            self.meter.restart()

        def take(ids: list[int]) -> None:
            if self.meter is not None:
                self.meter.tick()
            for event in stream.feed(ids):
                show(event)

        if self._is_parallel:
            _broadcast((prompt, seed))
        with _stop_on_interrupt(is_wanted=not self._is_parallel) as stop:
            self._generate(prompt, seed, take, stop)
        for event in stream.finish():
            show(event)
        message = stream.parsed.message
        if stop.is_set:
            message.pop("tool_calls", None)
        return message, stop.is_set

    def follow(self) -> None:
        """Generate what the first process does, until it leaves."""
        while (task := _broadcast(None)) is not None:
            prompt, seed = task
            self._generate(prompt, seed, lambda _: None, _Stop())
        _end_processes()

    def dismiss(self) -> None:
        """Let the other processes end."""
        if self._is_parallel:
            _broadcast(None)
            _end_processes()

    def _generate(self, prompt: list[int], seed: int, take: Callable[[list[int]], None], stop: "_Stop") -> None:
        import torch
        from transformers.generation.streamers import BaseStreamer

        from modeling_mistral_large.transformers_api import cache_argument

        class Streamer(BaseStreamer):
            is_prompt = True

            def put(self, value: torch.Tensor) -> None:
                if not self.is_prompt:
                    written.extend(value.flatten().tolist())
                    take(value.flatten().tolist())
                self.is_prompt = False

            def end(self) -> None:
                pass

        # Between two forward passes, also those of a long prompt's chunks, all layers have cached the same tokens.
        def stop_here(*_: Any) -> None:
            if stop.is_set:
                raise _StoppedError

        written: list[int] = []
        # The last token of a prompt is always read, as its logits are wanted.
        common = min(_common_length(self._cached, prompt), len(prompt) - 1)
        if excess := self._cache.get_seq_length() - common:
            self._cache.crop(-excess)
        self._cached = self._cached[:common]
        input_ids = torch.tensor([prompt], device=self._model.device)
        torch.manual_seed(seed)
        hook = self._model.register_forward_pre_hook(stop_here)
        try:
            with suppress(_StoppedError), nullcontext() if self.meter is None else self.meter.speculation:
                self._model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    prefill_chunk_size=self._prefill_chunk,
                    max_new_tokens=min(
                        self._sampling.max_new_tokens, self._model.config.max_position_embeddings - len(prompt)
                    ),
                    streamer=Streamer(),
                    **cache_argument(self._cache),
                    **self._sampling.options(),
                    **self._draft_options,
                )
        finally:
            hook.remove()
            # The last token that was written has not been read yet, and an error may have left more unread.
            self._cached = [*prompt, *written][: self._cache.get_seq_length()]


class _StoppedError(Exception):
    """Ctrl-C was pressed during generation."""


@dataclass
class _Stop:
    is_set: bool = False


@contextmanager
def _stop_on_interrupt(*, is_wanted: bool) -> Iterator[_Stop]:
    """Let ctrl-C set the flag that is yielded, where wanted, instead of ending the program."""
    stop = _Stop()
    if not is_wanted:
        yield stop
        return

    def interrupt(_: int, __: FrameType | None) -> None:
        stop.is_set = True

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def is_parallel() -> bool:
    """Return whether this process is one of several that `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _end_processes() -> None:
    """End the group of processes, in each of them: one that is left to the interpreter's end may abort there."""
    import torch.distributed

    torch.distributed.destroy_process_group()


def _broadcast(task: tuple[list[int], int] | None) -> tuple[list[int], int] | None:
    """Send what the first process has to all of them."""
    import torch.distributed

    box = [task]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    return next(
        (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other),
        min(len(first), len(second)),
    )


def load_model(
    name: str, hub: Mapping[str, Any], *, adapter: str | None = None, **options: Any
) -> tuple[Any, "MistralLargeTokenizer"]:
    """Return the model and the tokenizer of a folder of either layout, or of a repository on the hub.

    hub: the options of `hub_options`.
    adapter: folder or repository of a LoRA to be loaded on the model.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    from mistral_large_conversion.errors import CheckpointError, MistralLargeError
    from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
    from modeling_mistral_large.adapter_loading import adapter_base, load_on_base, named_base

    try:
        base = adapter_base(name, hub)
        if base is not None:
            print(f"{printable(name)}: an adapter, loaded on {printable(base)}", file=sys.stderr)
        tokenizer = MistralLargeTokenizer.from_pretrained(name, **hub)
        if adapter is None:
            model = MistralLargeForCausalLM.from_pretrained(name, **options, **hub)
        else:
            model = load_on_base(MistralLargeForCausalLM, name, adapter, **options, **hub)
            other = named_base(adapter, name, hub)
            note = "" if other is None else f"; it names {printable(other)} as its base"
            print(f"{printable(adapter)}: an adapter, loaded on {printable(name)}{note}", file=sys.stderr)
    except MistralLargeError:
        raise
    # transformers raises these for whatever it does not find.
    except (OSError, ValueError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: cannot be loaded ({problem}); pass a folder of the HF or the consolidated layout, or a repository"
        ) from error
    return model.eval(), tokenizer
