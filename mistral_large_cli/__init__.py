"""The `mistral-large` command.

Each command is declared in its own module. None of them imports torch, transformers or the library, which needs both,
before a model is loaded or a prompt is built, so everything else is answered at once.
"""

from typing import Annotated

import typer

from . import adopt, chat, compare, convert, demo, doctor, inspect, plan, retag, serve, show, terminal, verify

app = typer.Typer(
    name="mistral-large",
    help="Run Mistral-Large-Instruct-2407 with Hugging Face transformers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(convert.convert)
app.command()(adopt.adopt)
app.command()(verify.verify)
app.command()(inspect.inspect)
app.command()(compare.compare)
app.command()(retag.retag)
app.command()(chat.chat)
app.command()(show.show)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
app.command()(plan.plan)
app.command()(demo.demo)
app.command()(doctor.doctor)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        for name in ("modeling-mistral-large", "transformers", "torch", "tokenizers"):
            typer.echo(f"{name} {version(name)}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print the versions that matter."),
    ] = False,
) -> None:
    """Declare the options of the command itself."""


def main() -> None:
    """Run the command line: an error the user can act on is one line on standard error and exit code 2."""
    terminal.run(app)
