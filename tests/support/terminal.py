"""A pseudo-terminal with a screen: what a user of a program sees, and types."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby

import pyte
from rich.style import Style


class Screen(pyte.HistoryScreen):
    """A screen that answers the questions of programs, such as where the cursor is."""

    def __init__(self, columns: int, lines: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, lines, history=10000, ratio=0.5)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)


class Terminal:
    """The other end of a pseudo-terminal."""

    def __init__(self, descriptor: int, columns: int, lines: int) -> None:
        self._descriptor = descriptor
        self._screen = Screen(columns, lines, self.type)
        self._stream = pyte.ByteStream(self._screen)
        # All that came, for what may never come.
        self.received = b""
        # Made once for all that ask until something new comes.
        self._lines: list[str] | None = None

    @property
    def lines(self) -> list[str]:
        """What was scrolled away and what is seen, without the spaces at the ends of lines."""
        if self._lines is None:
            seen = [self._screen.buffer[row] for row in range(self._screen.lines)]
            self._lines = [self._text_of(line) for line in (*self._screen.history.top, *seen)]
        return self._lines

    def _text_of(self, line: Mapping[int, pyte.screens.Char]) -> str:
        return "".join(line[column].data for column in range(self._screen.columns)).rstrip()

    @property
    def text(self) -> str:
        return "\n".join(self.lines).rstrip("\n")

    def styled_lines(self) -> list[list[tuple[str, Style]]]:
        """What is seen, as texts with their styles."""
        lines = []
        for row, text in enumerate(self._screen.display):
            cells = [self._screen.buffer[row][column] for column in range(len(text.rstrip()))]
            groups = [(style, "".join(cell.data for cell in group)) for style, group in groupby(cells, key=_style_of)]
            lines.append([(part, style) for style, part in groups])
        return lines

    @property
    def last_line(self) -> str:
        """The line of the cursor."""
        return self._text_of(self._screen.buffer[self._screen.cursor.y])

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    @property
    def takes_keys(self) -> bool:
        """Whether the program reads single keys, as it does while a line is edited."""
        return not termios.tcgetattr(self._descriptor)[3] & termios.ICANON

    def paste(self, text: str) -> None:
        """What a terminal sends for a paste where the program has asked for bracketed pastes."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def wait_until(self, is_done: Callable[[], bool], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < end, f"too long:\n{self.text}"
            if select.select([self._descriptor], [], [], 0.05)[0]:
                with suppress(OSError):
                    data = os.read(self._descriptor, 65536)
                    self.received += data
                    self._lines = None
                    self._stream.feed(data)

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until a text is on the screen, or was; breaks of lines count as spaces."""
        self.wait_until(lambda: text in " ".join(self.text.split()) or text in self.text, seconds)

    def wait_for_prompt(self, seconds: float = 120) -> None:
        """Wait until the next message can be typed."""
        self.wait_until(lambda: self.last_line == ">", seconds)

    def send(self, text: str) -> str:
        """Type a line, wait for the next prompt and return what was printed in between."""
        # What is typed earlier comes to a prompt that is already drawn, so the wait would end before the line is read.
        assert self.takes_keys, f"a line would be typed while the program is busy:\n{self.text}"
        before = len(self.lines_so_far())
        self.type(f"{text}\r")
        self.wait_until(lambda: self.last_line == ">" and len(self.lines_so_far()) > before)
        return "\n".join(self.lines_so_far()[before:-1])

    def lines_so_far(self) -> list[str]:
        """All lines down to that of the cursor."""
        lines = self.lines
        return lines[: len(self._screen.history.top) + self._screen.cursor.y + 1]


def _style_of(cell: pyte.screens.Char) -> Style:
    """Return a character's style as rich has it."""
    colours = [
        None
        if name == "default"
        else f"#{name}"
        if re.fullmatch("[0-9a-f]{6}", name)
        else name.replace("brown", "yellow")
        for name in (cell.fg, cell.bg)
    ]
    return Style(color=colours[0], bgcolor=colours[1], bold=cell.bold, italic=cell.italics, reverse=cell.reverse)


def _take_terminal() -> None:
    """Have ctrl-C come from the terminal, also where the tests run in the background, which ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal_with(
    command: Sequence[str], environment: Mapping[str, str], *, columns: int = 100, lines: int = 40
) -> Iterator[tuple[Terminal, "subprocess.Popen[bytes]"]]:
    """Run a command at a terminal, and kill it in the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    cleaned = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        list(command),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**cleaned, "TERM": "xterm-256color"},
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        yield Terminal(ours, columns, lines), process
    finally:
        process.kill()
        process.wait()
        with suppress(OSError):
            os.close(ours)
