"""Markdown at a terminal while it is written: what is complete is printed for good, the rest is drawn again."""

import time
from typing import TYPE_CHECKING, Any

from .terminal import printable

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.markdown import Markdown

# Seconds between two drawings of what is not complete yet.
REDRAW = 0.1


def parser() -> "MarkdownIt":
    """A parser for which HTML is text: rich would drop it, and nothing that the model wrote may be lost."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def rendered(text: str) -> "Markdown":
    """Return Markdown as rich prints it, with the line ends of its paragraphs and with the addresses of its links."""
    from rich.markdown import Markdown

    # Not as links of the terminal, whose text may name another address.
    markdown = Markdown(text, hyperlinks=False, code_theme="ansi_dark")
    markdown.parsed = parser().parse(text)
    for token in markdown.parsed:
        for child in token.children or ():
            if child.type == "softbreak":
                child.type = "hardbreak"
    return markdown


class MarkdownView:
    """A response of one assistant message, drawn as it comes."""

    def __init__(self, console: "Console") -> None:
        self._console = console
        self._text = ""
        self._live: Live | None = None
        self._drawn = 0.0

    def add(self, text: str) -> None:
        """Take some more of the text, which may hold anything."""
        self._text += printable(text)
        if "\n" in text:
            self._print_complete()
        if time.monotonic() - self._drawn >= REDRAW:
            self._draw()

    def end(self) -> None:
        """Print what is left."""
        self._stop()
        if self._text.strip():
            self._console.print(rendered(self._text), soft_wrap=False)
        self._text = ""

    def _print_complete(self) -> None:
        """Print the blocks that nothing can change any more: all but the last one."""
        starts = [token.map[0] for token in parser().parse(self._text) if token.level == 0 and token.map]
        if len(starts) < 2 or not starts[-1]:
            return
        lines = self._text.splitlines(keepends=True)
        self._stop()
        self._console.print(rendered("".join(lines[: starts[-1]])), soft_wrap=False)
        self._console.print()
        self._text = "".join(lines[starts[-1] :])

    def _draw(self) -> None:
        from rich.live import Live

        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        self._live.update(_End(rendered(self._text)), refresh=True)
        self._drawn = time.monotonic()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._drawn = None, 0.0


class _End:
    """The last lines of what does not fit the terminal."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment

        lines = console.render_lines(self._inner, options, pad=False)
        for index, line in enumerate(lines[-max(1, console.size.height - 2) :]):
            if index:
                yield Segment.line()
            yield from line
