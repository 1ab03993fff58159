"""`mistral-large chat`: streamed responses, tools that are called, a conversation that can be saved."""

import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .conversation_file import (
    Conversation,
    Message,
    check_messages,
    formats_of_folder,
    load_conversation,
    save_conversation,
)
from .generation_session import GenerationSession, Sampling
from .highlighting import highlighted
from .model_argument import check_model
from .options import (
    DTYPES,
    TORCH_DTYPES,
    Adapter,
    CacheDir,
    Dtype,
    Kv,
    Model,
    PrefillChunk,
    Revision,
    Token,
    hub_options,
)
from .speculation import Draft, Drafting, DraftRevision, DraftTokens, Lookup
from .terminal import printable
from .tools_file import Tool, function_names, load_tools, tool_names

if TYPE_CHECKING:
    from rich.console import Console

HELP = """\
/system TEXT   set the system prompt; without a text, drop it
/tools FILE    offer the functions of a Python file to the model; without a file, none
/save FILE     write the conversation as JSON
/load FILE     continue a conversation that was saved
/reset         forget the conversation; system prompt and tools stay
/prompt        show what the model has read and written, control tokens and all
/help          this
/exit          leave, as ctrl-D does
//TEXT         a message that begins with one slash
Ctrl-C stops a response. A message of several lines begins and ends with a line that is \"\"\"; none is a command."""
WITH_ARGUMENT = ("/system", "/tools", "/save", "/load")
BLOCK_MARK = '"""'


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tools: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Python file whose functions the model may call.")
    ] = None,
    load: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Conversation to continue, as /save writes it.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.7,
    top_p: Annotated[
        float | None, typer.Option(min=0, max=1, help="Sample from the most likely tokens of this total probability.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="Random seed, also of the ids of tool calls.")
    ] = None,
    max_rounds: Annotated[int, typer.Option(min=1, help="Most responses with tool calls in a row.")] = 8,
    dtype: Annotated[Literal["auto", Dtype], typer.Option(help="Dtype of the weights; auto: as stored.")] = "auto",
    device_map: Annotated[
        str | None, typer.Option(help="Where the weights go: auto (default), cpu, cuda, …; not under torchrun.")
    ] = None,
    kv: Kv = "auto",
    prefill_chunk: PrefillChunk = 2048,
    commands: Annotated[
        bool, typer.Option("--commands", help="Obey lines that begin with a slash also from a pipe; see /help.")
    ] = False,
    draft: Draft = None,
    lookup: Lookup = False,
    draft_tokens: DraftTokens = None,
    adapter: Adapter = None,
    revision: Revision = None,
    draft_revision: DraftRevision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Chat with a model in the terminal, with tools; under torchrun with tensor parallelism.

    From a pipe, each line is a message, and so is a block between two lines that are \"\"\".
    """
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    hub = hub_options(model, revision, token, cache_dir, draft=draft)
    drafting = Drafting.read(draft, lookup, draft_tokens, draft_revision, token, cache_dir)
    check_model(model, hub, device_map, adapter)
    if drafting is not None and drafting.draft is not None:
        check_model(drafting.draft, drafting.hub, device_map)
    conversation = Conversation()
    if tools is not None:
        conversation.tools = load_tools(tools)
    if load is not None:
        load_conversation(conversation, load, *formats_of_folder(model))
    if system is not None:
        if conversation.system is not None:
            from mistral_large_conversion.errors import ConversationError

            raise ConversationError(f"--system: {load} has a system prompt of its own; leave one of the two out")
        conversation.system = system
    session = GenerationSession(
        model,
        sampling,
        dtype=TORCH_DTYPES.get(DTYPES.get(dtype, dtype), dtype),
        device_map=device_map,
        kv=kv,
        prefill_chunk=prefill_chunk,
        hub=hub,
        adapter=adapter,
        drafting=drafting,
    )
    if not session.is_first:
        session.follow()
        return
    from rich.console import Console

    if load is not None:
        # Of a repository or an adapter, the format is known now.
        check_messages(conversation.messages, None, *session.prompt_formats)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        Chat(console, conversation, session, max_rounds, commands=commands).run()
    finally:
        session.dismiss()


class Chat:
    """The terminal of a chat: lines that are read, responses that are printed."""

    def __init__(
        self,
        console: "Console",
        conversation: Conversation,
        session: GenerationSession,
        max_rounds: int,
        *,
        commands: bool,
    ) -> None:
        self._console = console
        self._conversation = conversation
        self._session = session
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
        """Read messages and respond until the input ends."""
        from mistral_large_conversion.errors import MistralLargeError

        if self._is_terminal:
            with suppress(ImportError):
                # Gives `input` a history and the arrow keys.
                importlib.import_module("readline")
            self._note(f"{self._session.description}\nCtrl-C stops a response, /help lists the commands.")
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
        """Yield each message, a line or a block of several, and each command, with whether it is one."""
        from mistral_large_conversion.errors import ConversationError

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
        name, *rest = line.split(maxsplit=1)
        if not self._has_mentioned_commands and name in (*self._commands, "/exit"):
            self._has_mentioned_commands = True
            names = function_names(Path(rest[0].strip())) if rest and name == "/tools" else []
            offered = f", so {', '.join(names)} cannot be called" if names else ""
            print(f"{name} is text here, as all that comes from a pipe{offered}; --commands obeys it", file=sys.stderr)

    def _obey(self, line: str) -> bool:
        """Do what a command says, and return whether it ends the chat."""
        from mistral_large_conversion.errors import ConversationError

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
        """Let the model respond, call tools and respond again; an empty response takes the message back."""
        from modeling_mistral_large.generation.tool_loop import run_tool_loop

        conversation = self._conversation
        messages = [*conversation.messages, {"role": "user", "content": text}]
        printed = len(messages)
        was_stopped = False

        def print_results(history: Sequence[Message]) -> None:
            nonlocal printed
            for message in history[printed:]:
                if message["role"] == "tool":
                    self._console.print(f"→ {printable(message['content'])}", style="green")
            printed = len(history)

        def generate(history: list[Message], tools: Sequence[Tool]) -> Message:
            nonlocal was_stopped
            print_results(history)
            message, was_stopped = self._session.respond(conversation.with_system(history), tools, self._show)
            self._end_line()
            if self._session.meter is not None:
                self._note(self._session.meter.line())
            return message

        try:
            messages = run_tool_loop(
                generate,
                messages,
                conversation.tools,
                max_rounds=self._max_rounds,
                prompt_format=next(iter(self._session.prompt_formats), None),
            )
        except KeyboardInterrupt:
            self._note("\nstopped in a tool: this turn is forgotten")
            return
        print_results(messages)
        if messages[-1]["role"] == "tool":
            self._note(f"the model still calls tools after {self._max_rounds} rounds")
        if was_stopped:
            self._note("stopped")
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            # No prompt can hold an empty response.
            self._note("no response: this turn is forgotten")
            return
        conversation.messages = messages

    def _show(self, event: Any) -> None:
        """Print an event of a response as it comes."""
        from modeling_mistral_large.instruct import TextEvent

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
        load_conversation(self._conversation, Path(name), *self._session.prompt_formats)
        self._note(f"{len(self._conversation.messages)} messages from {name}")

    def _reset(self, _: str) -> None:
        self._conversation.messages = []

    def _show_prompt(self, _: str) -> None:
        if not self._conversation.messages:
            self._note("nothing was said yet")
            return
        ids = self._session.prompt(
            self._conversation.with_system(self._conversation.messages), self._conversation.tools
        )
        self._console.print(highlighted(self._session.tokenizer, ids))
