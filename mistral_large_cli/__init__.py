"""The `mistral-large` command.

A package beside modeling_mistral_large, because importing that one registers with transformers and so imports torch:
here nothing heavy is imported before a command runs, and help and usage errors answer at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="mistral-large",
    help="Run Mistral-Large-Instruct-2407 with Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        for name in ("modeling-mistral-large", "transformers", "torch", "tokenizers"):
            typer.echo(f"{name} {version(name)}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions that matter."),
    ] = False,
) -> None:
    """Options of the command itself; without this callback, typer would drop the name of a single command."""


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            exists=True,
            file_okay=False,
            help="Folder with params.json, consolidated*.safetensors and tokenizer.model.v3.",
        ),
    ],
    destination: Annotated[Path, typer.Argument(file_okay=False, help="Folder for the HF layout, new or empty.")],
    max_shard_size: Annotated[str, typer.Option(help="Largest size of one output file, such as 5GB.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source and print the plan only.")] = False,
) -> None:
    """Convert a consolidated checkpoint to the HF layout, one tensor in memory at a time."""
    from .convert import convert as run

    run(source, destination, max_shard_size, dry_run)


@app.command()
def demo(
    keep: Annotated[
        Path | None, typer.Option(file_okay=False, help="Convert into this folder and keep it, new or empty.")
    ] = None,
) -> None:
    """Convert the bundled toy checkpoint, chat with it and let it call a tool."""
    from .demo import run_demo

    run_demo(keep)


def main() -> None:
    """Run the command line; an error the user can act on is one line on stderr and exit code 2."""
    try:
        app()
    except Exception as error:
        # Only a module that is already imported can have raised ours.
        errors = sys.modules.get("modeling_mistral_large.errors")
        if errors is None or not isinstance(error, errors.MistralLargeError):
            raise
        typer.echo(f"mistral-large: {error}", err=True)
        sys.exit(2)
