"""A generation session: a model with its cache and, under `torchrun`, its ranks.

The first rank is the caller's; it sends every prompt to the others, which only generate.
"""

import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.errors import CheckpointError, ConversationError, MistralLargeError

from .conversation_file import Message
from .response_meter import ResponseMeter
from .sampling import Sampling
from .terminal import printable
from .tools_file import Tool

if TYPE_CHECKING:
    from modeling_mistral_large import MistralLargeTokenizer
    from modeling_mistral_large.instruct import AnswerStream

    from .speculation import Drafting

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
        drafting: "Drafting | None" = None,
    ) -> None:
        import torch
        import transformers

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
            self._draft_options = drafting.generate_options(self._model, self.tokenizer, dtype=dtype, **place)
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
        interrupts: list[int] = []
        # Other processes would go on without the first one.
        with nullcontext() if self._is_parallel else _stop_on_interrupt(self.chat.stop, interrupts):
            self._generate(prompt, seed, take, show_prefill)
        for event in stream.finish():
            show(event)
        message = stream.message()
        if interrupts:
            message.pop("tool_calls", None)
        return message, bool(interrupts)

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


class StoppedText:
    """An `AnswerStream` whose text ends before the first stop string; what may begin one is held back."""

    def __init__(self, stream: "AnswerStream", stop: Sequence[str]) -> None:
        from modeling_mistral_large.serving.completion_text import StopStrings

        self._stream, self._stops = stream, StopStrings(stop)
        self._said = ""

    @property
    def is_stopped(self) -> bool:
        """Return whether a stop string has ended the text."""
        return self._stops.is_stopped

    def feed(self, ids: list[int]) -> list[Any]:
        """Take the next ids and return what they complete."""
        return self._filtered(self._stream.feed(ids))

    def finish(self) -> list[Any]:
        """Take the end of the response and return what was held back for it."""
        return [*self._filtered(self._stream.finish()), *self._text(self._stops.finish())]

    def message(self) -> dict[str, Any]:
        """Return the response as a message; one that a stop string ended calls no tools."""
        if self.is_stopped:
            return {"role": "assistant", "content": self._said}
        return self._stream.parsed.message

    def _filtered(self, events: Sequence[Any]) -> list[Any]:
        from modeling_mistral_large.instruct import TextEvent

        passed: list[Any] = []
        for event in events:
            if self.is_stopped:
                break
            if isinstance(event, TextEvent):
                passed += self._text(self._stops.feed(event.text))
            else:
                passed += [*self._text(self._stops.finish()), event]
        return passed

    def _text(self, text: str) -> list[Any]:
        from modeling_mistral_large.instruct import TextEvent

        self._said += text
        return [TextEvent(text)] if text else []


@contextmanager
def _stop_on_interrupt(stop: Callable[[], None], interrupts: list[int]) -> Iterator[None]:
    """Let ctrl-C call `stop` instead of ending the program, and note it in a list."""

    def interrupt(number: int, _: FrameType | None) -> None:
        interrupts.append(number)
        stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
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
    from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
    from modeling_mistral_large.adapter_loading import adapter_base, load_on_base, named_base

    try:
        base = adapter_base(name, hub)
        if base is not None:
            print(adapter_remark(name, base), file=sys.stderr)
        tokenizer = MistralLargeTokenizer.from_pretrained(name, **hub)
        if adapter is None:
            model = MistralLargeForCausalLM.from_pretrained(name, **options, **hub)
        else:
            model = load_on_base(MistralLargeForCausalLM, name, adapter, **options, **hub)
            print(adapter_remark(adapter, name, named_base(adapter, name, hub)), file=sys.stderr)
    except MistralLargeError:
        raise
    # transformers raises these for whatever it does not find.
    except (OSError, ValueError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: cannot be loaded ({problem}); pass a folder of the HF or the consolidated layout, or a repository"
        ) from error
    return model.eval(), tokenizer


def adapter_remark(adapter: str, base: str, named: str | None = None) -> str:
    """Return the line that says what is loaded on what, and the base that the adapter names, where it is another."""
    note = "" if named is None else f"; it names {printable(named)} as its base"
    return f"{printable(adapter)}: an adapter, loaded on {printable(base)}{note}"
