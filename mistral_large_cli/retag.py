"""Printing of `mistral-large retag`: the files that were changed."""

from pathlib import Path
from typing import TYPE_CHECKING

from .marks import one_line
from .terminal import print_line

if TYPE_CHECKING:
    from mistral_large_conversion.model_card import ModelType


def retag(folder: Path, model_type: "ModelType") -> None:
    """Retag a folder and say which files were changed.

    Raises:
        MistralLargeError: the reasons of `retag_checkpoint`.
    """
    from mistral_large_conversion.retag import retag_checkpoint

    changed = retag_checkpoint(folder, model_type)
    done = f"changed {', '.join(changed)}" if changed else "as it was"
    print_line(f"{one_line(str(folder))}: model type {model_type}; {done}")
