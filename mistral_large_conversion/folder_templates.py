"""The chat templates of a folder, in all places where transformers has looked for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.layout import CHAT_TEMPLATE_NAME, TOKENIZER_CONFIG_NAME
from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object, shown
from mistral_large_conversion.errors import TokenizerFileError

ADDITIONAL_TEMPLATES_NAME = "additional_chat_templates"
OLDER_TEMPLATE_NAME = "chat_template.json"
DEFAULT = "default"


def read_chat_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates of a folder by name, "default" first.

    Files count before tokenizer_config.json, whose content is `settings`, as for transformers.

    Raises:
        TokenizerFileError: one that cannot be read.
    """
    found: dict[str, str] = {}
    if _is_there(folder / CHAT_TEMPLATE_NAME):
        found[DEFAULT] = _read(folder, CHAT_TEMPLATE_NAME)
    more = folder / ADDITIONAL_TEMPLATES_NAME
    for path in sorted(more.glob("*.jinja")):
        found.setdefault(path.stem, _read(more, path.name))
    if not found:
        found = _named(settings.get("chat_template"), TOKENIZER_CONFIG_NAME)
    if not found and _is_there(folder / OLDER_TEMPLATE_NAME):
        try:
            content = read_json_object(folder / OLDER_TEMPLATE_NAME)
        except (OSError, ValueError) as error:
            raise TokenizerFileError(f"{folder / OLDER_TEMPLATE_NAME}: {error}; download it again") from error
        found = _named(content.get("chat_template"), OLDER_TEMPLATE_NAME)
    return {name: text for name, text in sorted(found.items(), key=lambda item: item[0] != DEFAULT) if text.strip()}


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _read(folder: Path, name: str) -> str:
    if problem := file_problem(folder, name):
        raise TokenizerFileError(f"{folder}: {problem}; download it again")
    return (folder / name).read_bytes().decode("utf-8", errors="replace")


def _named(value: object, name: str) -> dict[str, str]:
    """The templates that a setting has: one, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    entries = value if isinstance(value, list) else []
    named = {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
    if not named or len(named) != len(entries):
        raise TokenizerFileError(
            f"{name}: chat_template is {shown(value)}: must be a text, or a list of objects with name and template; "
            "download it again"
        )
    return named
