"""`mistral-large verify`: one row for each check."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from mistral_large_conversion.checkpoint.hub import resolve_source
from mistral_large_conversion.errors import SettingError

from .options import AsJson, CacheDir, Revision, Token, hub_options
from .terminal import console, one_line, print_json, progress_bar

RESULTS = {True: ("ok", "green"), False: ("wrong", "bold red"), None: ("not proven", "yellow")}


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder with a checkpoint, of either layout.")],
    source: Annotated[
        str | None, typer.Argument(help="Folder or repository on the hub it was converted from, of either layout.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or repository of the LoRA that `convert --adapter` merged.")
    ] = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Check a checkpoint, and compare every bit with its source; exit code 1 if anything is wrong."""
    if adapter is not None and source is None:
        raise SettingError(f"--adapter {adapter}: has no effect without SOURCE, which it was merged into; give it")
    hub = hub_options(source, revision, token, cache_dir)
    from mistral_large_conversion import verify_checkpoint

    origin = None if source is None else resolve_source(source, **hub)
    # In a folder with both layouts one of them is read, and the bar ends early.
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.is_file())
    with progress_bar("verifying", total, console(stderr=True)) as advance:
        checks = verify_checkpoint(folder, origin, adapter=adapter, progress=advance)
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
            result, style = RESULTS[check.is_ok]
            table.add_row(check.name, Text(result, style=style), Text(one_line(check.detail)))
        console().print(table)
    raise typer.Exit(not is_ok)
