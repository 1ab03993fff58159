"""Printing of `mistral-large verify`: one row for each check."""

import sys
from dataclasses import asdict
from pathlib import Path

from .marks import one_line
from .terminal import console, print_json

MARKS = {True: ("ok", "green"), False: ("wrong", "bold red"), None: ("not proven", "yellow")}


def verify(folder: Path, source: str | None, as_json: bool) -> None:
    """Check `folder`, compare it with `source`, say so, and exit with 1 if anything is wrong.

    Raises:
        MistralLargeError: the reasons of `verify_checkpoint` and `resolve_source`.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from mistral_large_conversion import verify_checkpoint
    from mistral_large_conversion.checkpoint.hub import resolve_source

    origin = None if source is None else resolve_source(source)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    stderr = console(stderr=True)
    with Progress(TextColumn("verifying"), *columns, console=stderr, disable=not stderr.is_terminal) as bar:
        # A folder with both layouts makes this too much, and the bar end early.
        task = bar.add_task(
            "verifying", total=sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
        )
        checks = verify_checkpoint(folder, origin, progress=lambda count: bar.advance(task, count))
    is_ok = all(check.is_ok is not False for check in checks)
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "ok": is_ok,
                "proven": all(check.is_ok for check in checks),
                "checks": [asdict(check) for check in checks],
            }
        )
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table("check", "result", "detail", box=None, pad_edge=False)
        for check in checks:
            mark, style = MARKS[check.is_ok]
            table.add_row(check.name, Text(mark, style=style), Text(one_line(check.detail)))
        console().print(table)
    sys.exit(not is_ok)
