"""docs/command-line.md, made of the commands' own help.

python -m tests.repository.command_line
"""

from collections.abc import Callable
from inspect import Parameter, cleandoc, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

from mistral_large_cli import app

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
COMMANDS: dict[str, Callable[..., Any]] = {
    command.callback.__name__: command.callback for command in app.registered_commands if command.callback
}
INTRODUCTION = """\
# The command line

<!-- Made of the commands' help: python -m tests.repository.command_line -->

`mistral-large COMMAND --help`, or `-h`, prints what is here; `mistral-large --version` prints the versions that matter.
Exit codes: 0 where all is well; 1 where the result is negative (a check that fails, a model that does not fit); 2 for
an error, which is one line that says what to do.

A repository on the hub is named as `owner/name`. `--revision`, `--token` and `--cache-dir` say which version of it is
read, with which access token, and where downloads are kept; with a folder they are refused, as they have no effect.
"""


def reference() -> str:
    """Return the page: each command with its arguments and options."""
    return "\n".join([INTRODUCTION, *(section(name, command) for name, command in COMMANDS.items())])


def section(name: str, command: Callable[..., Any]) -> str:
    """Return what one command takes."""
    parameters = [each for each in signature(command).parameters.values() if each.annotation is not typer.Context]
    arguments = [each for each in parameters if isinstance(declared(each), typer.models.ArgumentInfo)]
    options = [each for each in parameters if isinstance(declared(each), typer.models.OptionInfo)]
    assert len(arguments) + len(options) == len(parameters)
    usage = " ".join(
        each.name.upper() if each.default is Parameter.empty else f"[{each.name.upper()}]" for each in arguments
    )
    lines = [f"## {name}", "", cleandoc(command.__doc__ or ""), ""]
    lines += ["```", " ".join(f"mistral-large {name} {usage} [OPTIONS]".split()), "```", ""]
    if arguments:
        lines += ["| argument | |", "| --- | --- |"]
        lines += [f"| `{each.name.upper()}` | {declared(each).help} |" for each in arguments] + [""]
    lines += ["| option | default | |", "| --- | --- | --- |"]
    return "\n".join(
        lines + [f"| {spelling(each)} | {default(each)} | {declared(each).help} |" for each in options] + [""]
    )


def declared(parameter: Parameter) -> Any:
    """Return what a command declares of a parameter."""
    return parameter.annotation.__metadata__[0]


def spelling(option: Parameter) -> str:
    """Return how an option is typed, with the values or the type that it takes."""
    # The first name in `Annotated` is where a default would be.
    names = [
        each for each in (declared(option).default, *(declared(option).param_decls or ())) if isinstance(each, str)
    ]
    names = names or [f"--{option.name.replace('_', '-')}"]
    (kind,) = [each for each in members(get_args(option.annotation)[0]) if each is not NoneType]
    if kind is bool:
        return f"`{names[0]}`"
    takes = " ".join(f"`{value}`" for value in get_args(kind)) if get_origin(kind) is Literal else kind.__name__.upper()
    return f"`{names[0]}` {takes}"


def members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def default(option: Parameter) -> str:
    """Return the default of an option; nothing where it has none, or is a flag."""
    if option.default is Parameter.empty:
        return "required"
    if isinstance(shown := declared(option).show_default, str):
        return f"`{shown}`"
    return "" if option.default is None or option.default is False else f"`{option.default}`"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
