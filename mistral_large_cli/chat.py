"""A chat in the terminal: streamed answers, tools that are called, a conversation that can be saved.

Under `torchrun` the first process reads and prints; it sends every prompt to the others, which only generate.
"""

import importlib
import json
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from .conversation_file import read_conversation
from .marks import printable, with_marks
from .tools_file import Tool, load_tools, tool_names

if TYPE_CHECKING:
    from rich.console import Console

    from modeling_mistral_large import MistralLargeTokenizer

Message = dict[str, Any]

HELP = """\
/system TEXT   set the system prompt; without a text, drop it
/tools FILE    offer the functions of a Python file to the model; without a file, none
/save FILE     write the conversation as JSON
/load FILE     go on with a conversation that was saved
/reset         forget the conversation; system prompt and tools stay
/prompt        show what the model has read and written, control tokens and all
/help          this
/exit          leave, as ctrl-D does
//TEXT         a message that begins with one slash
Ctrl-C stops an answer. A message of several lines begins and ends with a line that is \"\"\"; none is a command."""
WITH_ARGUMENT = ("/system", "/tools", "/save", "/load")
BLOCK_MARK = '"""'
# Logits divided by less overflow.
SMALLEST_TEMPERATURE = 0.001


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at a temperature of 0.

    seed: also of the ids of tool calls that the model gives none.

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


@dataclass
class Conversation:
    """What can be saved and loaded, and the functions that the model may call."""

    messages: list[Message] = field(default_factory=list)
    system: Any = None  # text, or text chunks from a file
    tools: list[Tool] = field(default_factory=list)
    # Files this conversation was written to or read from: they may be written again.
    own_files: set[Path] = field(default_factory=set)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *messages]


def chat(
    model_name: str,
    *,
    system: str | None,
    tools: Path | None,
    load: Path | None,
    sampling: Sampling,
    max_rounds: int,
    dtype: str,
    device_map: str | None,
    kv: str,
    prefill_chunk: int,
    commands: bool,
) -> None:
    """Talk with a model until the input ends.

    model_name: a folder of either layout, or a repository on the hub.
    commands: obey commands that come from a pipe; those of a terminal are obeyed anyway.

    Raises:
        MistralLargeError: what the command line asks for cannot be had; in a pipe also what a line asks for.
    """
    from rich.console import Console

    from modeling_mistral_large.errors import ConversationError

    conversation = Conversation()
    if tools is not None:
        conversation.tools = load_tools(tools)
    if load is not None:
        load_conversation(conversation, load)
    if system is not None:
        if conversation.system is not None:
            raise ConversationError(f"--system: {load} has a system prompt of its own; leave one of the two out")
        conversation.system = system
    console = Console(highlight=False, markup=False, soft_wrap=True)
    speaker = Speaker(model_name, sampling, dtype=dtype, device_map=device_map, kv=kv, prefill_chunk=prefill_chunk)
    if not speaker.is_first:
        speaker.follow()
        return
    try:
        Chat(console, conversation, speaker, max_rounds, commands=commands).run()
    finally:
        speaker.dismiss()


class Chat:
    """The lines that are read, and what becomes of each."""

    def __init__(
        self, console: "Console", conversation: Conversation, speaker: "Speaker", max_rounds: int, *, commands: bool
    ) -> None:
        self._console = console
        self._conversation = conversation
        self._speaker = speaker
        self._max_rounds = max_rounds
        self._is_terminal = sys.stdin.isatty()
        self._obeys_commands = self._is_terminal or commands
        self._has_mentioned_commands = self._obeys_commands
        self._is_line_open = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/tools": self._set_tools,
            "/save": self._save,
            "/load": self._load,
            "/reset": self._reset,
            "/prompt": self._show_prompt,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> None:
        """Read and answer until the input ends."""
        from mistral_large_conversion.errors import MistralLargeError

        if self._is_terminal:
            with suppress(ImportError):
                # Gives `input` a history and the arrow keys.
                importlib.import_module("readline")
            self._note(f"{self._speaker.description}\nCtrl-C stops an answer, /help lists the commands.")
        elif isinstance(sys.stdin, TextIOWrapper):
            # Whatever the locale: a document in a pipe is not typed by the user of this terminal.
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        for text, is_command in self._inputs():
            try:
                if not is_command:
                    self._answer(text)
                elif self._obey(text):
                    return
            except MistralLargeError as error:
                # A pipe has nobody to read it and do better.
                if not self._is_terminal:
                    raise
                self._console.print(printable(str(error)), style="red")

    def _inputs(self) -> Iterator[tuple[str, bool]]:
        """Yield each message, a line or all between two marks, and each command, with whether it is one."""
        from modeling_mistral_large.errors import ConversationError

        block: list[str] | None = None
        while True:
            try:
                line = input(("… " if block is not None else "> ") if self._is_terminal else "")
            except EOFError:
                if block:
                    yield "\n".join(block), False
                return
            except UnicodeDecodeError as error:
                raise ConversationError(f"standard input: {error}; messages are UTF-8; convert them") from error
            except OSError as error:
                raise ConversationError(
                    f"standard input: cannot be read: {error.strerror}; messages are lines of text; name such a file"
                ) from error
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                block = None
                self._note("\n/exit or ctrl-D leaves.")
                continue
            if line.strip() == BLOCK_MARK:
                if block is not None and any(text.strip() for text in block):
                    yield "\n".join(block), False
                block = [] if block is None else None
            elif block is not None:
                block.append(line)
            elif self._obeys_commands and line.startswith("/"):
                is_command = not line.startswith("//")
                yield (line if is_command else line[1:]), is_command
            elif line.strip():
                self._mention_commands(line)
                yield line, False

    def _mention_commands(self, line: str) -> None:
        """Say once, next to the responses, that what looks like a command was taken as text."""
        name = line.split(maxsplit=1)[0]
        if not self._has_mentioned_commands and name in (*self._commands, "/exit"):
            self._has_mentioned_commands = True
            print(f"{name} is text here, as all that comes from a pipe; --commands obeys it", file=sys.stderr)

    def _obey(self, line: str) -> bool:
        """Do what a command says, and return whether it ends the chat."""
        from modeling_mistral_large.errors import ConversationError

        name, *rest = line.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        if name not in self._commands and name != "/exit":
            raise ConversationError(
                f"{name}: no such command; /help lists them; // begins a message with a slash; correct it"
            )
        if argument and name not in WITH_ARGUMENT:
            raise ConversationError(f"{name}: takes nothing, not {argument!r}; write {name} alone")
        if name != "/exit":
            self._commands[name](argument)
        return name == "/exit"

    def _answer(self, text: str) -> None:
        """Let the model answer, call tools and answer again; an answer of nothing takes the message back."""
        from modeling_mistral_large.generation.tool_loop import run_tool_loop

        conversation = self._conversation
        messages = [*conversation.messages, {"role": "user", "content": text}]
        known = len(messages)
        was_stopped = False

        def generate(history: list[Message], tools: Sequence[Tool]) -> Message:
            nonlocal was_stopped
            message, was_stopped = self._speaker.answer(conversation.with_system(history), tools, self._show)
            self._end_line()
            return message

        try:
            for _ in range(self._max_rounds):
                messages = run_tool_loop(generate, messages, conversation.tools, max_rounds=1)
                for message in messages[known + 1 :]:
                    self._console.print(f"→ {printable(message['content'])}", style="green")
                known = len(messages)
                if messages[-1]["role"] != "tool":
                    break
            else:
                self._note(f"the model still calls tools after {self._max_rounds} rounds")
        except KeyboardInterrupt:
            self._note("\nstopped in a tool: this turn is forgotten")
            return
        if was_stopped:
            self._note("stopped")
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            # No prompt can hold an answer without a word.
            self._note("no answer: this turn is forgotten")
            return
        conversation.messages = messages

    def _show(self, event: Any) -> None:
        """Print a part of an answer as it comes."""
        from modeling_mistral_large.instruct.answer import TextEvent

        if isinstance(event, TextEvent):
            self._console.out(printable(event.text), end="", highlight=False)
            self._is_line_open = True
            # What is not a terminal is buffered otherwise.
            self._console.file.flush()
            return
        function = event.tool_call["function"]
        call = f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"
        self._end_line()
        self._console.print(printable(call), style="yellow")

    def _end_line(self) -> None:
        if self._is_line_open:
            self._console.print()
        self._is_line_open = False

    def _note(self, text: str) -> None:
        self._console.print(text, style="dim")

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None

    def _set_tools(self, name: str) -> None:
        self._conversation.tools = load_tools(Path(name)) if name else []
        self._note(f"tools: {', '.join(tool_names(self._conversation.tools)) or 'none'}")

    def _save(self, name: str) -> None:
        path = save_conversation(self._conversation, name)
        self._note(f"{len(self._conversation.messages)} messages in {path}")

    def _load(self, name: str) -> None:
        load_conversation(self._conversation, Path(name))
        self._note(f"{len(self._conversation.messages)} messages from {name}")

    def _reset(self, _: str) -> None:
        self._conversation.messages = []

    def _show_prompt(self, _: str) -> None:
        if not self._conversation.messages:
            self._note("nothing was said yet")
            return
        ids = self._speaker.prompt(
            self._conversation.with_system(self._conversation.messages), self._conversation.tools
        )
        self._console.print(with_marks(self._speaker.tokenizer, ids))


class Speaker:
    """The model with its cache: what two prompts have in common is computed once."""

    def __init__(
        self, model_name: str, sampling: Sampling, *, dtype: str, device_map: str | None, kv: str, prefill_chunk: int
    ) -> None:
        import torch
        import transformers
        from transformers import DynamicCache

        from mistral_large_conversion.checkpoint.names import expected_tensors
        from mistral_large_conversion.errors import SettingError
        from modeling_mistral_large.inference.kv_cache import Fp8Cache

        transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        self._is_parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self._is_parallel and device_map is not None:
            raise SettingError("--device-map: under torchrun each process has its own GPU; leave it out")
        self.is_first = int(os.environ.get("RANK", "0")) == 0
        if not self.is_first:
            transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        place = {"tp_plan": "auto"} if self._is_parallel else {"device_map": device_map or "auto"}
        self._model, self.tokenizer = load_model(model_name, dtype=dtype, **place)
        self._sampling = sampling
        config = self._model.config
        self._cache: Any = Fp8Cache(config) if kv == "fp8" else DynamicCache(config=config)
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

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        """Return the ids of a prompt."""
        ids: list[int] = self.tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, return_dict=False
        )
        return ids

    def answer(
        self, messages: Sequence[Message], tools: Sequence[Tool], show: Callable[[Any], None]
    ) -> tuple[Message, bool]:
        """Generate the next message, hand its parts to `show` as they come, and return it and whether it was stopped.

        An answer that was stopped calls no tools.
        """
        import torch

        from modeling_mistral_large.errors import ConversationError
        from modeling_mistral_large.instruct.answer import AnswerStream

        prompt = self.prompt(messages, tools)
        limit = self._model.config.max_position_embeddings
        if len(prompt) >= limit:
            raise ConversationError(
                f"the conversation has {len(prompt)} tokens; the model reads fewer than {limit}; /reset starts anew"
            )
        seed = int(torch.randint(2**31, (1,), generator=self._random))
        stream = AnswerStream(self.tokenizer.pieces, rng=random.Random(seed))

        def take(ids: list[int]) -> None:
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
            with suppress(_StoppedError):
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
                )
        finally:
            hook.remove()
            # The last token that was written has not been read yet, and an error may have left more unread.
            self._cached = [*prompt, *written][: self._cache.get_seq_length()]


class _StoppedError(Exception):
    """Ctrl-C was pressed while an answer was generated."""


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


def load_model(name: str, **options: Any) -> tuple[Any, "MistralLargeTokenizer"]:
    """Return the model and the tokenizer of a folder of either layout, or of a repository on the hub.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    from mistral_large_conversion.errors import CheckpointError, MistralLargeError
    from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
    from modeling_mistral_large.adapter_loading import adapter_base

    try:
        base = adapter_base(name, {})
        if base is not None:
            print(f"{printable(name)}: an adapter, loaded on {printable(base)}", file=sys.stderr)
        tokenizer = MistralLargeTokenizer.from_pretrained(name)
        model = MistralLargeForCausalLM.from_pretrained(name, **options)
    except MistralLargeError:
        raise
    # transformers raises these for whatever it does not find.
    except (OSError, ValueError) as error:
        finding = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{name}: cannot be loaded ({finding}); pass a folder of the HF or the consolidated layout, or a repository"
        ) from error
    return model.eval(), tokenizer


def save_conversation(conversation: Conversation, name: str) -> Path:
    """Write a conversation to a new file, or to one it was saved to or loaded from, and return its path.

    Raises:
        DestinationError: no name, the file is another one's, or it cannot be written.
    """
    from mistral_large_conversion.checkpoint.atomic_write import whole_file
    from mistral_large_conversion.errors import DestinationError

    if not name:
        raise DestinationError("/save: no name of a file; pass one")
    path = Path(name).absolute()
    if path.exists() and path not in conversation.own_files:
        raise DestinationError(f"{path}: exists, and is not of this conversation; choose another name")
    messages = conversation.with_system(conversation.messages)
    try:
        with whole_file(path) as out:
            out.write(json.dumps({"messages": messages}, ensure_ascii=False, indent=2).encode())
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}; choose another name") from error
    conversation.own_files.add(path)
    return path


def load_conversation(conversation: Conversation, path: Path) -> None:
    """Take over the messages of a file; tools stay as they are.

    Raises:
        ConversationError: no such file, no conversation in it, or definitions of tools, which nobody could run.
    """
    from modeling_mistral_large.errors import ConversationError

    messages, tools = read_conversation(path)
    if tools:
        raise ConversationError(
            f"{path}: has definitions of tools; the chat calls Python functions; remove them and pass a tools file"
        )
    system = None
    if isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system, *messages = messages
    conversation.messages = messages
    conversation.system = system["content"] if system else None
    conversation.own_files.add(path.absolute())
