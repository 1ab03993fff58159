"""What `chat` prints: responses as they come, calls and their results, notes, and the progress of a long prompt."""

import json
from typing import TYPE_CHECKING, Any

from .terminal import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

    from .markdown_view import MarkdownView


class ChatScreen:
    """The output of a chat.

    is_markdown: responses are rendered, at a terminal; otherwise their text is printed to the letter.
    """

    def __init__(self, console: "Console", *, is_markdown: bool) -> None:
        self.console = console
        self._is_markdown = is_markdown
        self._view: MarkdownView | None = None
        self._status: Status | None = None
        self._is_line_open = False

    def note(self, text: str) -> None:
        """Say something of the chat itself."""
        self.console.print(text, style="dim")

    def error(self, error: Exception) -> None:
        """Say what cannot be done."""
        self.console.print(printable(str(error)), style="red")

    def show(self, event: Any) -> None:
        """Print an event of a response as it comes."""
        from modeling_mistral_large.instruct import TextEvent

        self._end_status()
        if not isinstance(event, TextEvent):
            self.end_response()
            self.console.print(printable(call_text(event.tool_call["function"])), style="yellow")
        elif self._is_markdown:
            if self._view is None:
                from .markdown_view import MarkdownView

                self._view = MarkdownView(self.console)
            self._view.add(event.text)
        else:
            self.console.out(printable(event.text), end="", highlight=False)
            self._is_line_open = True
            # What is not a terminal is buffered otherwise.
            self.console.file.flush()

    def show_prefill(self, read: int, tokens: int) -> None:
        """Show at a terminal how much of a prompt is read."""
        if not self.console.is_terminal or read == tokens:
            self._end_status()
            return
        text = f"reading the prompt: {read:,} of {tokens:,} tokens"
        if self._status is None:
            self._status = self.console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def show_result(self, content: str) -> None:
        """Print what a tool has returned."""
        self.console.print(f"→ {printable(content)}", style="green")

    def end_response(self) -> None:
        """Print what is left of a response, and end its line."""
        self._end_status()
        if self._view is not None:
            self._view.end()
            self._view = None
        if self._is_line_open:
            self.console.print()
        self._is_line_open = False

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
        self._status = None


def call_text(function: Any) -> str:
    """Return a call as it is shown: the function and its arguments as JSON."""
    return f"{function['name']}({json.dumps(function['arguments'], ensure_ascii=False)})"
