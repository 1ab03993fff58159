"""Where text leaves the program: nothing in it commands the terminal, and no stream makes it fail.

Names, settings and texts of a checkpoint, and what a model writes, come from anyone. They are made harmless here and
not where they are printed: `console` and `print_json` for results, `run` for errors, warnings and logs.
"""

import errno
import io
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mistral_large_conversion.checkpoint.atomic_write import atomic_write
from mistral_large_conversion.errors import DestinationError, MistralLargeError

if TYPE_CHECKING:
    from types import TracebackType

    import typer
    from rich.console import Console

# Everything that can move the cursor, change the terminal or turn the order of letters around, and what no terminal can
# print: what is left are line ends and tabs.
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What begins another line or column.
_BREAKS = re.compile("[\t\n\u2028\u2029]")
# A stream that is full, gone, or never was.
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def printable(text: str) -> str:
    """Return a text that nobody has checked as it may be printed: escape sequences and the like become �."""
    return _TERMINAL_CONTROLS.sub("\ufffd", text)


def one_line(text: str) -> str:
    """Return a text that nobody has checked as it may be printed in a line that says something of it."""
    return _BREAKS.sub("\ufffd", printable(text))


def console(**options: Any) -> "Console":
    """A rich console for text that nobody has checked; `options` are those of rich."""
    from rich.console import Console
    from rich.segment import Segment

    class SafeConsole(Console):
        """Its own colours and movements of the cursor are segments apart from the text."""

        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return SafeConsole(**{"highlight": False, "markup": False, **options})


@contextmanager
def progress_bar(label: str, total: int, console: "Console") -> Iterator[Callable[[int], None]]:
    """Show a bar of `total` bytes on a terminal, and yield what is told the bytes that are done."""
    # A bar that is redrawn makes no sense in a file or a pipe.
    if not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn(label), *columns, console=console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)


def print_json(content: Any) -> None:
    """Print what only a program reads: all that is not printable ASCII is escaped."""
    print(json.dumps(content, indent=2))


def write_picture(path: Path, text: str) -> None:
    """Write what was printed as a page or a picture, as a new file: what hard links of the name hold stays.

    Raises:
        DestinationError: it cannot be written.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device has no content to be replaced.
            path.write_bytes(data)
        else:
            with atomic_write(path.resolve()) as stream:
                stream.write(data)
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}; choose another name") from error


def print_error(text: str) -> None:
    """Say on stderr what is wrong, if that can be said at all."""
    with suppress(OSError):
        print(f"mistral-large: {printable(text)}", file=sys.stderr, flush=True)


def run(app: "typer.Typer") -> NoReturn:
    """Run the command line: an error the user can act on is one line on stderr and exit code 2."""
    with _safe_streams():
        sys.exit(_exit_code(app))


def _exit_code(app: "typer.Typer") -> int:
    import typer

    try:
        try:
            code = app(standalone_mode=False)
        except SystemExit as exit_:
            code = exit_.code
        # A full disk may show only now.
        sys.stdout.flush()
        return int(code or 0)
    except typer.Abort:
        return 1
    except BrokenPipeError:
        _discard_output()
        return 1
    except MistralLargeError as error:
        print_error(str(error))
        return 2
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS and error.filename is None:
            print_error(f"the output cannot be written: {error.strerror}; make room or send it elsewhere")
            _discard_output()
            return 2
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            # A usage error, which quotes what was typed: a name from a folder, perhaps.
            # typer has a copy of click whose classes have no public name.
            usage_error: Any = error
            usage_error.message = printable(usage_error.message)
            from typer.rich_utils import rich_format_error

            with suppress(OSError):
                rich_format_error(usage_error)
            return int(usage_error.exit_code)
        sys.excepthook = _print_traceback
        raise


@contextmanager
def _safe_streams() -> Iterator[None]:
    """Make streams, logs and warnings fit for any text."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            # It was closed; or else the next file that is opened would take its place.
            _open_nothing(descriptor, name)
    replaced = []
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            replaced.append((stream, stream.errors))
            stream.reconfigure(errors="backslashreplace")
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def make_safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        # A message that does not fit its arguments is logging's to report.
        with suppress(TypeError, ValueError, KeyError):
            if printable(record.getMessage()) == record.getMessage():
                return record
            # Some formatters read the arguments: that of uvicorn the address, the path and the status of a request.
            if isinstance(record.args, tuple):
                record.args = tuple(printable(value) if isinstance(value, str) else value for value in record.args)
            if (safe := printable(record.getMessage())) != record.getMessage():
                record.msg, record.args = safe, None
        return record

    def format_safe_warning(*args: Any, **kwargs: Any) -> str:
        return printable(format_warning(*args, **kwargs))

    logging.setLogRecordFactory(make_safe_record)
    warnings.formatwarning = format_safe_warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(make_record)
        warnings.formatwarning = format_warning
        for stream, errors in replaced:
            with suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


def _open_nothing(descriptor: int, name: str) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened != descriptor:
        os.dup2(opened, descriptor)
        os.close(opened)
    setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))


def _discard_output() -> None:
    """Let what could not be written go: at its end, Python would try again and complain."""
    with suppress(OSError, ValueError):
        opened = os.open(os.devnull, os.O_WRONLY)
        os.dup2(opened, sys.stdout.fileno())
        os.close(opened)


def _print_traceback(kind: type[BaseException], error: BaseException, where: "TracebackType | None") -> None:
    print(printable("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)
