"""docs/command-line.md, made of the commands' own help.

python -m tests.repository.command_line
"""

from pathlib import Path
from typing import Any

import typer.main

from mistral_large_cli import app

PAGE = Path(__file__).parents[2] / "docs" / "command-line.md"
GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands
INTRODUCTION = """\
# The command line

<!-- Made of the commands' help: python -m tests.repository.command_line -->

`mistral-large COMMAND --help`, or `-h`, prints what is here. `--version` prints the versions that matter. Exit codes: 0
where all is well, 1 where the answer is no (a check that fails, a model that does not fit), 2 for an error, which is
one line that says what to do.

A repository on the hub is named as `owner/name`; `--revision`, `--token` and `--cache-dir` say which version of it is
read, with whose access and where downloads are kept.
"""


def reference() -> str:
    """Return the page: each command with its arguments and options."""
    return "\n".join([INTRODUCTION, *(section(name, command) for name, command in COMMANDS.items())])


def section(name: str, command: Any) -> str:
    """Return what one command takes."""
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join(
        [
            "mistral-large",
            name,
            *(each.human_readable_name if each.required else f"[{each.human_readable_name}]" for each in arguments),
        ]
    )
    lines = [f"## {name}", "", *str(command.help).strip().splitlines(), "", "```", f"{usage} [OPTIONS]", "```", ""]
    if arguments:
        lines += ["| argument | |", "| --- | --- |"]
        lines += [f"| `{each.human_readable_name}` | {each.help} |" for each in arguments] + [""]
    if options:
        lines += ["| option | default | |", "| --- | --- | --- |"]
        lines += [f"| {spelling(each)} | {default(each)} | {cell(each.help or '')} |" for each in options] + [""]
    return "\n".join(lines)


def spelling(option: Any) -> str:
    """Return how an option is typed."""
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.is_flag:
        return names
    choices = getattr(option.type, "choices", None)
    return f"{names} {', '.join(map(str, choices)) if choices else option.type.name.upper()}"


def default(option: Any) -> str:
    """Return the default of an option, or nothing where it has none or is a flag."""
    if isinstance(option.show_default, str):
        return option.show_default
    return "" if option.default is None or option.is_flag else f"{option.default}"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
