"""Conversations in files: JSON as `/save` of the chat writes it, or as a client of OpenAI's API sends it."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.atomic_write import atomic_write
from mistral_large_conversion.checkpoint.layout import layouts_of
from mistral_large_conversion.errors import ConversationError, DestinationError, MistralLargeError

from .tools_file import Tool, tool_names

Message = dict[str, Any]


@dataclass
class Conversation:
    """What can be saved and loaded, and the functions that the model may call."""

    messages: list[Message] = field(default_factory=list)
    system: Any = None  # text, or text chunks from a file
    tools: list[Tool] = field(default_factory=list)
    # Files this conversation was written to or read from: they may be written again.
    own_files: set[Path] = field(default_factory=set)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *messages]


def read_conversation(path: Path, prompt_format: str | None = None) -> tuple[list[Any], list[Any] | None]:
    """Return messages and tools of `{"messages": […], "tools": […]}`, or of the list of messages alone; `-` is stdin.

    Raises:
        ConversationError: no such file, or no conversation in it that has a prompt in this format.
    """
    try:
        content = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversationError(f"{path}: {error}; a conversation is JSON as /save writes it; name one") from error
    messages, tools = (content.get("messages"), content.get("tools")) if isinstance(content, dict) else (content, None)
    if not isinstance(messages, list):
        raise ConversationError(f"{path}: no messages; a conversation is JSON as /save writes it; name one")
    if not isinstance(tools, list | None):
        raise ConversationError(f"{path}: tools is not a list; tools are definitions as OpenAI has them; pass a list")
    try:
        check_messages(messages, tools, prompt_format)
    except ConversationError as error:
        raise ConversationError(f"{path}: {error}") from error
    return messages, tools


def format_of_folder(model: str) -> str | None:
    """Return the prompt format of a local checkpoint, before torch is imported; None where it is not known yet."""
    from mistral_large_conversion.folder_tokenizer import read_folder_tokenizer

    # What is wrong with it, loading it says.
    with suppress(MistralLargeError):
        return read_folder_tokenizer(model).prompt_format if layouts_of(Path(model)) else None
    return None


def check_messages(messages: list[Any], tools: list[Any] | None, prompt_format: str | None = None) -> None:
    """Check that a conversation has a prompt in this format, or in any if none is given.

    Raises:
        ConversationError: it has none; that of the first format.
    """
    from modeling_mistral_large.instruct import build_prompt
    from modeling_mistral_large.instruct.formats import FORMATS

    problems = []
    for each in FORMATS if prompt_format is None else (prompt_format,):
        try:
            build_prompt(messages, tools, prompt_format=each)
        except ConversationError as error:
            problems.append(error)
        else:
            return
    raise problems[0]


def save_conversation(conversation: Conversation, name: str) -> Path:
    """Write a conversation to a new file, or to one it was saved to or loaded from, and return its path.

    Raises:
        DestinationError: no name, the file is another one's, or it cannot be written.
    """
    if not name:
        raise DestinationError("/save: no name of a file; pass one")
    path = Path(name).absolute()
    if path.exists() and path not in conversation.own_files:
        raise DestinationError(f"{path}: exists, and is not of this conversation; choose another name")
    messages = conversation.with_system(conversation.messages)
    try:
        with atomic_write(path) as out:
            out.write(json.dumps({"messages": messages}, ensure_ascii=False, indent=2).encode())
    except OSError as error:
        raise DestinationError(f"{path}: cannot be written: {error.strerror}; choose another name") from error
    conversation.own_files.add(path)
    return path


def load_conversation(conversation: Conversation, path: Path, prompt_format: str | None = None) -> None:
    """Take over the messages of a file; tools are kept.

    Raises:
        ConversationError: no such file, no conversation in it that has a prompt in this format, or
            definitions of tools that the chat has no functions for, so that nobody could run them.
    """
    messages, tools = read_conversation(path, prompt_format)
    defined = {str((tool.get("function") or tool).get("name")) for tool in tools or ()}
    if missing := defined.difference(tool_names(conversation.tools)):
        raise ConversationError(
            f"{path}: has definitions of tools; the chat calls Python functions, and has none called "
            f"{', '.join(sorted(missing))}; pass a tools file with them first, or remove the definitions"
        )
    system = None
    if isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system, *messages = messages
    conversation.messages = messages
    conversation.system = system["content"] if system else None
    conversation.own_files.add(path.absolute())
