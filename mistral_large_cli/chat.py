"""`mistral-large chat`: streamed responses, tools that are called, a conversation that can be saved."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Literal

import typer

from mistral_large_conversion.errors import ConversationError, MistralLargeError

from .chat_commands import COMMANDS, ChatCommands
from .chat_page import chat_on_page
from .chat_screen import ChatScreen
from .chat_turns import ChatTurns
from .conversation_file import Conversation, check_messages, format_of_folder, load_conversation
from .generation_session import GenerationSession
from .line_editor import LineEditor, history_file
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
from .sampling import NAMES, Sampling
from .speculation import Draft, Drafting, DraftRevision, DraftTokens, Lookup
from .terminal import console
from .tools_file import Tool, function_names, load_tools

BLOCK_MARK = '"""'
# Typed alone at a terminal.
LEAVING = ("exit", "quit")


def chat(
    context: typer.Context,
    model: Model,
    web: Annotated[bool, typer.Option("--web", help="Chat on a page in the browser, with its own settings.")] = False,
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
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from this many most likely tokens.")] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from tokens of this probability at least, as a share of the largest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="More than 1 makes tokens that were there less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends a response, which does not hold it; repeatable.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=-(2**63), max=2**63 - 1, help="Random seed, also of the ids of tool calls.")
    ] = None,
    mcp: Annotated[
        list[str] | None,
        typer.Option(help="MCP server whose tools the model may call: a command or an http(s) address; repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Run tools without asking at the terminal.")] = False,
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
    plain: Annotated[bool, typer.Option("--plain", help="Print responses to the letter, without Markdown.")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither read nor write the messages of other chats.")
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
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, top_k, min_p, repetition_penalty, tuple(stop or ()))
    hub = hub_options(model, revision, token, cache_dir, draft=draft)
    drafting = Drafting.read(draft, lookup, draft_tokens, draft_revision, hub)
    check_model(model, hub, device_map, adapter)
    if drafting is not None and drafting.draft is not None:
        check_model(drafting.draft, drafting.hub, device_map)
    torch_dtype = TORCH_DTYPES.get(DTYPES.get(dtype, dtype), dtype)
    if web:
        chat_on_page(context, model, dtype=torch_dtype, hub=hub, adapter=adapter, drafting=drafting)
        return
    conversation = Conversation()
    if tools is not None:
        conversation.tools = load_tools(tools)
    if load is not None:
        load_conversation(conversation, load, format_of_folder(model))
    if system is not None:
        if conversation.system is not None:
            raise ConversationError(f"--system: {load} has a system prompt of its own; leave one of the two out")
        conversation.system = system
    session = GenerationSession(
        model,
        sampling,
        dtype=torch_dtype,
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
    is_terminal = sys.stdout.isatty()
    # Lines of the chat itself are broken between words at a terminal, and nowhere else.
    out = console(soft_wrap=not is_terminal)
    more_tools: Sequence[Tool] = ()
    with ExitStack() as stack:
        stack.callback(session.dismiss)
        if load is not None:
            # Of a repository or an adapter, the format is known now.
            check_messages(conversation.messages, None, session.tokenizer.prompt_format)
        if mcp:
            # The client's event loop is imported only where there are any.
            from .mcp_tools import McpServers

            servers = McpServers(mcp)
            stack.callback(servers.close)
            more_tools = servers.tools
        Chat(
            ChatScreen(out, is_markdown=is_terminal and not plain),
            conversation,
            session,
            max_rounds=max_rounds,
            commands=commands,
            asks=not yes,
            history=None if no_history else history_file(),
            more_tools=more_tools,
        ).run()


class Chat:
    """The input of a chat: lines that are read, and what they are: messages or commands."""

    def __init__(
        self,
        screen: ChatScreen,
        conversation: Conversation,
        session: GenerationSession,
        *,
        max_rounds: int,
        commands: bool,
        asks: bool,
        history: Path | None,
        more_tools: Sequence[Tool] = (),
    ) -> None:
        self._screen = screen
        self._conversation = conversation
        self._session = session
        self._is_terminal = sys.stdin.isatty()
        self._editor: LineEditor | None = None
        if self._is_terminal and sys.stdout.isatty():
            self._editor = LineEditor(COMMANDS, NAMES, history, screen.note)
        self._obeys_commands = self._is_terminal or commands
        self._has_mentioned_commands = self._obeys_commands
        # Text to be edited where the next message is typed.
        self._default: str | None = None
        ask = self._ask if self._is_terminal and asks else None
        self._turns = ChatTurns(screen, conversation, session, max_rounds, ask=ask, more_tools=more_tools)
        self._commands = ChatCommands(self._turns, self._edit)

    def run(self) -> None:
        """Read messages and respond until the input ends."""
        if self._is_terminal:
            self._screen.note(f"{self._session.description}\nCtrl-C stops a response, /help lists the commands.")
        elif isinstance(sys.stdin, TextIOWrapper):
            # Whatever the locale: a document in a pipe is not typed by the user of this terminal.
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        for text, is_command in self._inputs():
            try:
                if is_command:
                    if self._commands.obey(text):
                        return
                    continue
                # What is sent after /edit replaces the last turn.
                before = self._conversation.messages
                if self._default is not None:
                    self._default = None
                    before = before[: self._turns.last_turn()]
                self._turns.answer({"role": "user", "content": text}, before)
            except MistralLargeError as error:
                # A pipe has nobody to read it and do better.
                if not self._is_terminal:
                    raise
                self._screen.error(error)

    def _inputs(self) -> Iterator[tuple[str, bool]]:
        """Yield each message, a line or a block of several, and each command, with whether it is one."""
        block: list[str] | None = None
        while True:
            try:
                line = self._read("… " if block is not None else "> ")
            except EOFError:
                if block:
                    yield "\n".join(block), False
                return
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
                block = self._default = None
                self._screen.note("\n/exit or ctrl-D leaves.")
                continue
            is_edited = self._default is not None
            if line.strip() == BLOCK_MARK:
                if block is not None and any(text.strip() for text in block):
                    yield "\n".join(block), False
                block = [] if block is None else None
            elif block is not None:
                block.append(line)
            elif self._is_terminal and not is_edited and line.strip() in LEAVING:
                return
            # A paste is a message, whatever it begins with.
            elif self._obeys_commands and not is_edited and line.startswith("/") and "\n" not in line.rstrip("\n"):
                is_command = not line.startswith("//")
                yield (line if is_command else line[1:]), is_command
            elif line.strip():
                self._mention_commands(line)
                yield line, False
            elif is_edited:
                self._default = None

    def _read(self, prompt: str) -> str:
        try:
            if self._editor is not None:
                return self._editor.read(prompt, self._default or "")
            return input(prompt if self._is_terminal else "")
        except UnicodeDecodeError as error:
            raise ConversationError(f"standard input: {error}; messages are UTF-8; convert them") from error
        except OSError as error:
            raise ConversationError(
                f"standard input: cannot be read: {error.strerror}; messages are lines of text; name such a file"
            ) from error

    def _ask(self, question: str) -> str:
        ask: Callable[[str], str] = input if self._editor is None else self._editor.ask
        try:
            return ask(question)
        except EOFError:
            return ""

    def _edit(self, text: str) -> None:
        if self._editor is None:
            raise ConversationError("/edit: no terminal to edit the last message at; write /edit TEXT")
        self._default = text

    def _mention_commands(self, line: str) -> None:
        """Say once, next to the responses, that what looks like a command was taken as text."""
        name, *rest = line.split(maxsplit=1)
        if not self._has_mentioned_commands and name in COMMANDS:
            self._has_mentioned_commands = True
            names = function_names(Path(rest[0].strip())) if rest and name == "/tools" else []
            offered = f", so {', '.join(names)} cannot be called" if names else ""
            print(f"{name} is text here, as all that comes from a pipe{offered}; --commands obeys it", file=sys.stderr)
