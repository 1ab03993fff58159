"""Printing of `mistral-large retag`: the files that were changed."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from modeling_mistral_large.conversion.model_card import ModelType


def retag(folder: Path, model_type: "ModelType") -> None:
    """Retag a folder and say which files were changed.

    Raises:
        MistralLargeError: the reasons of `retag_checkpoint`.
    """
    from modeling_mistral_large.conversion.retag import retag_checkpoint

    changed = retag_checkpoint(folder, model_type)
    typer.echo(f"{folder}: model type {model_type}; " + (f"changed {', '.join(changed)}" if changed else "as it was"))
