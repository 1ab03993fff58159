"""The line in which messages are typed at a terminal: several lines, pastes, history, completion."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings

# Commands whose argument is the name of a file.
WITH_FILE = ("/tools", "/save", "/load")


def history_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where messages are remembered: in the user's folder for what programs keep between two runs."""
    state = environment.get("XDG_STATE_HOME", "")
    # The specification has relative paths ignored.
    folder = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return folder / "modeling-mistral-large" / "chat-history"


class LineEditor:
    """A line editor of several lines, in which Enter sends, and Alt+Enter or Esc Enter begins a line.

    A paste is text, whatever lines it has. Ctrl-X ctrl-E opens $EDITOR.

    commands: what Tab completes at the beginning. settings: what it completes after /set.
    history: the file of what was sent, readable by its owner alone; None remembers nothing.
    """

    def __init__(
        self, commands: Sequence[str], settings: Sequence[str], history: Path | None, warn: Callable[[str], None]
    ) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, PathCompleter
        from prompt_toolkit.document import Document

        class CommandCompleter(Completer):
            def get_completions(self, document: Document, event: "CompleteEvent") -> "Iterable[Completion]":
                from prompt_toolkit.completion import Completion

                text = document.text_before_cursor
                if "\n" in document.text or not text.startswith("/"):
                    return
                name, space, argument = text.partition(" ")
                if space and name in WITH_FILE:
                    inner = Document(argument.lstrip())
                    yield from PathCompleter(expanduser=False).get_completions(inner, event)
                    return
                known = commands if not space else settings if name == "/set" else ()
                typed = argument if space else name
                for each in known:
                    if each.startswith(typed):
                        yield Completion(each, start_position=-len(typed))

        self._session: PromptSession[str] = PromptSession(
            history=_history(history, warn),
            multiline=True,
            key_bindings=_bindings(),
            completer=CommandCompleter(),
            complete_while_typing=False,
            enable_open_in_editor=True,
            enable_suspend=True,
            prompt_continuation="  ",
        )

    def read(self, prompt: str, default: str = "") -> str:
        """Return what is sent.

        Raises:
            EOFError: ctrl-D. KeyboardInterrupt: ctrl-C.
        """
        return self._session.prompt([("bold ansicyan", prompt)], default=default)

    def ask(self, question: str) -> str:
        """Return what is typed at a question, which is not remembered.

        Raises:
            EOFError: ctrl-D. KeyboardInterrupt: ctrl-C.
        """
        from prompt_toolkit import prompt

        return prompt(question)


def _bindings() -> "KeyBindings":
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _begin_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _history(path: Path | None, warn: Callable[[str], None]) -> "History":
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class OwnHistory(FileHistory):
        """Messages that cannot be written down are remembered until the end."""

        def store_string(self, string: str) -> None:
            # Surrogates of a terminal that is not in UTF-8 have no place in the file.
            with suppress(OSError, UnicodeError):
                super().store_string(string)

    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
        # It may be an older one.
        path.chmod(0o600)
    except OSError as error:
        warn(f"{path}: {error.strerror}; messages are forgotten at the end of this chat")
        return InMemoryHistory()
    return OwnHistory(str(path))
