"""The commands of a chat: lines that begin with a slash."""

import json
from collections.abc import Callable
from pathlib import Path

from mistral_large_conversion.errors import ConversationError, SettingError

from .chat_turns import ChatTurns
from .conversation_file import load_conversation, save_conversation
from .highlighting import highlighted
from .terminal import one_line
from .tools_file import load_tools, tool_names

HELP = """\
/system TEXT   set the system prompt; without a text, drop it
/tools FILE    offer the functions of a Python file to the model; without a file, none
/set NAME VALUE  change temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed or stop;
               off drops one; without arguments, list them
/regenerate    respond to the last message again
/edit TEXT     replace the last message; without a text, edit it
/undo          take the last message and its response back
/save FILE     write the conversation as JSON
/load FILE     continue a conversation that was saved
/reset         forget the conversation; system prompt and tools stay
/status        model, context used, settings and tools
/prompt        show what the model has read and written, control tokens and all
/help          this
/exit          leave, as /quit, ctrl-D and exit alone do
//TEXT         a message that begins with one slash
Enter sends, Alt+Enter or Esc Enter begins a line, Tab completes, ctrl-X ctrl-E opens $EDITOR. A paste is one message.
Ctrl-C stops a response. A message of several lines begins and ends with a line that is \"\"\"; none is a command."""
WITH_ARGUMENT = ("/system", "/tools", "/save", "/load", "/set", "/edit")
ENDS = ("/exit", "/quit")


class ChatCommands:
    """What each command does.

    edit: called with the text of the last message, to have it edited where the next one is typed.
    """

    def __init__(self, turns: ChatTurns, edit: Callable[[str], None]) -> None:
        self._turns, self._edit = turns, edit
        self._conversation, self._screen = turns.conversation, turns.screen

    def obey(self, line: str) -> bool:
        """Do what a command says, and return whether it ends the chat."""
        name, *rest = line.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        if name not in COMMANDS:
            raise ConversationError(
                f"{name}: no such command; /help lists them; // begins a message with a slash; correct it"
            )
        if argument and name not in WITH_ARGUMENT:
            raise ConversationError(f"{name}: takes nothing, not {argument!r}; write {name} alone")
        if name not in ENDS:
            ACTIONS[name](self, argument)
        return name in ENDS

    def _set_system(self, text: str) -> None:
        self._conversation.system = text or None

    def _set_tools(self, name: str) -> None:
        self._conversation.tools = load_tools(Path(name)) if name else []
        self._screen.note(f"tools: {', '.join(tool_names(self._turns.tools)) or 'none'}")

    def _set(self, argument: str) -> None:
        session = self._turns.session
        if not argument:
            self._screen.note("\n".join(session.sampling.lines()))
            return
        name, *rest = argument.split(maxsplit=1)
        if not rest:
            raise SettingError(f"/set {name}: no value; give one, as in /set temperature 0.7")
        session.set_sampling(session.sampling.changed(name, rest[0].strip()))

    def _regenerate(self, _: str) -> None:
        last = self._turns.last_turn()
        messages = self._conversation.messages
        self._turns.answer(messages[last], messages[:last])

    def _replace(self, text: str) -> None:
        last = self._turns.last_turn()
        if text:
            self._turns.answer({"role": "user", "content": text}, self._conversation.messages[:last])
            return
        content = self._conversation.messages[last]["content"]
        self._edit(content if isinstance(content, str) else "".join(part.get("text", "") for part in content))

    def _undo(self, _: str) -> None:
        last = self._turns.last_turn()
        taken = self._conversation.messages[last]["content"]
        self._conversation.messages = self._conversation.messages[:last]
        text = one_line(taken) if isinstance(taken, str) else json.dumps(taken, ensure_ascii=False)
        self._screen.note(f"taken back: {text if len(text) < 60 else f'{text[:60]}…'}")

    def _save(self, name: str) -> None:
        path = save_conversation(self._conversation, name)
        self._screen.note(f"{len(self._conversation.messages)} messages in {path}")

    def _load(self, name: str) -> None:
        load_conversation(self._conversation, Path(name), self._turns.session.tokenizer.prompt_format)
        self._screen.note(f"{len(self._conversation.messages)} messages from {name}")

    def _reset(self, _: str) -> None:
        self._conversation.messages = []

    def _show_status(self, _: str) -> None:
        session, conversation = self._turns.session, self._conversation
        system = "none" if conversation.system is None else json.dumps(conversation.system, ensure_ascii=False)
        self._screen.note(
            "\n".join(
                (
                    session.description,
                    f"{len(conversation.messages)} messages; {session.meter.context()}",
                    f"system prompt: {one_line(system)}",
                    f"tools: {', '.join(tool_names(self._turns.tools)) or 'none'}",
                    *session.sampling.lines(),
                )
            )
        )

    def _show_prompt(self, _: str) -> None:
        if not self._conversation.messages:
            self._screen.note("nothing was said yet")
            return
        session = self._turns.session
        ids = session.prompt(self._turns.prompt_messages, self._turns.tools)
        self._screen.console.print(highlighted(session.tokenizer, ids))

    def _help(self, _: str) -> None:
        self._screen.note(HELP)


ACTIONS: dict[str, Callable[[ChatCommands, str], None]] = {
    "/system": ChatCommands._set_system,
    "/tools": ChatCommands._set_tools,
    "/set": ChatCommands._set,
    "/regenerate": ChatCommands._regenerate,
    "/edit": ChatCommands._replace,
    "/undo": ChatCommands._undo,
    "/save": ChatCommands._save,
    "/load": ChatCommands._load,
    "/reset": ChatCommands._reset,
    "/status": ChatCommands._show_status,
    "/prompt": ChatCommands._show_prompt,
    "/help": ChatCommands._help,
}
COMMANDS = (*ACTIONS, *ENDS)
