"""A generation session: a model with its cache and, under `torchrun`, its ranks.

The first rank is the caller's; it sends every prompt to the others, which only generate.
"""

import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from .conversation_file import Message
from .response_meter import ResponseMeter
from .sampling import Sampling
from .speculation import Drafting
from .stop_strings import StoppedText
from .terminal import printable
from .tools_file import Tool

if TYPE_CHECKING:
    from modeling_mistral_large import MistralLargeTokenizer

# What a process is told to generate: the prompt, the seed and how tokens are chosen.
Task = tuple[list[int], int, Sampling]


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
        from modeling_mistral_large.generation import ChatSession
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
        if drafting is not None:
            self._draft_options = drafting.generate_options(
                self._model, self.tokenizer, load_model, dtype=dtype, **place
            )
        config = self._model.config
        self.chat = ChatSession(
            self._model, self.tokenizer, session_cache(self._model, "fp8" if kv == "fp8" else "bf16")
        )
        self.meter = ResponseMeter(self.chat.speculation, self.chat.context_length, has_drafts=drafting is not None)
        self._prefill_chunk = prefill_chunk
        self._random = torch.Generator()
        self.sampling = sampling
        self._reseed()
        parameters = sum(math.prod(tensor.shape) for tensor in expected_tensors(config))
        self.description = (
            f"{model_name}: {parameters / 1e9:,.3g} B parameters, {self._model.dtype}, {self._model.device}"
        )

    def set_sampling(self, sampling: Sampling) -> None:
        """Choose tokens in another way from now on; with another seed, random numbers begin anew."""
        has_other_seed = sampling.seed != self.sampling.seed
        self.sampling = sampling
        if has_other_seed:
            self._reseed()

    def _reseed(self) -> None:
        if self.sampling.seed is not None:
            self._random.manual_seed(self.sampling.seed)
        else:
            self._random.seed()

    @property
    def prompt_formats(self) -> tuple[str, ...]:
        """The instruct format of the model's prompts; none where they are what a template of its own renders."""
        prompt_format: str | None = self.tokenizer.prompt_format
        return () if prompt_format is None else (prompt_format,)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Return the ids of a prompt."""
        return self.chat.prompt(messages, tools)

    def respond(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool],
        show: Callable[[Any], None],
        show_prefill: Callable[[int, int], None] | None = None,
    ) -> tuple[Message, bool]:
        """Generate the next message, hand its events to `show` as they come, and return it and whether it was stopped.

        show_prefill: called with the tokens read and those of the prompt, between two chunks of it.

        A response that was stopped calls no tools, and one that a stop string ends has none of it.
        """
        import torch

        from mistral_large_conversion.errors import ConversationError
        from modeling_mistral_large.instruct.answer import AnswerStream

        prompt = self.prompt(messages, tools)
        if len(prompt) >= (limit := self.chat.context_length):
            raise ConversationError(
                f"the conversation has {len(prompt)} tokens; the model reads fewer than {limit}; /reset starts anew"
            )
        seed = int(torch.randint(2**31, (1,), generator=self._random))
        stream = StoppedText(AnswerStream(self.tokenizer.pieces, rng=random.Random(seed)), self.sampling.stop)
        self.meter.restart(len(prompt))

        def take(ids: list[int]) -> None:
            self.meter.tick(len(ids))
            for event in stream.feed(ids):
                show(event)
            if stream.is_stopped and not self._is_parallel:
                self.chat.stop()

        if self._is_parallel:
            _broadcast((prompt, seed, self.sampling))
        with _stop_on_interrupt(self.chat.stop, is_wanted=not self._is_parallel) as was_interrupted:
            self._generate(prompt, seed, take, show_prefill)
        for event in stream.finish():
            show(event)
        message = stream.message()
        if was_interrupted():
            message.pop("tool_calls", None)
        return message, was_interrupted()

    def follow(self) -> None:
        """Generate what the first process does, until it leaves."""
        while (task := _broadcast(None)) is not None:
            prompt, seed, self.sampling = task
            self._generate(prompt, seed, lambda _: None, None)
        _end_processes()

    def dismiss(self) -> None:
        """Let the other processes end."""
        if self._is_parallel:
            _broadcast(None)
            _end_processes()

    def _generate(
        self,
        prompt: list[int],
        seed: int,
        take: Callable[[list[int]], None],
        show_prefill: Callable[[int, int], None] | None,
    ) -> None:
        import torch

        torch.manual_seed(seed)
        self.chat.generate(
            prompt,
            on_tokens=take,
            on_prefill=show_prefill,
            prefill_chunk_size=self._prefill_chunk,
            **self.sampling.options(),
            **self._draft_options,
        )


@contextmanager
def _stop_on_interrupt(stop: Callable[[], None], *, is_wanted: bool) -> Iterator[Callable[[], bool]]:
    """Let ctrl-C call `stop`, where wanted, instead of ending the program; yield what tells whether it did."""
    interrupts: list[int] = []
    if not is_wanted:
        yield lambda: False
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(interrupts)
    finally:
        signal.signal(signal.SIGINT, before)


def is_parallel() -> bool:
    """Return whether this process is one of several that `torchrun` has started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _end_processes() -> None:
    """End the group of processes, in each of them: one that is left to the interpreter's end may abort there."""
    import torch.distributed

    torch.distributed.destroy_process_group()


def _broadcast(task: Task | None) -> Task | None:
    """Send what the first process has to all of them."""
    import torch.distributed

    box = [task]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


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
