"""`mistral-large retag`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .terminal import one_line


def retag(
    folder: Annotated[Path, typer.Argument(help="Folder of the HF layout; its weights are not changed.")],
    as_: Annotated[
        Literal["mistral_large", "mistral"],
        typer.Option("--as", help="Model type to write. mistral: for engines without this package."),
    ],
) -> None:
    """Switch a converted checkpoint to the other model type without touching its weights."""
    from mistral_large_conversion.retag import retag_checkpoint

    changed = retag_checkpoint(folder, as_)
    done = f"changed {', '.join(changed)}" if changed else "unchanged"
    print(f"{one_line(str(folder))}: model type {as_}; {done}")
