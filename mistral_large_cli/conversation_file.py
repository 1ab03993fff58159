"""Conversations in files: JSON as `/save` of the chat writes it, or as a client of OpenAI's API sends it."""

import json
import sys
from pathlib import Path
from typing import Any


def read_conversation(path: Path) -> tuple[list[Any], list[Any] | None]:
    """Return messages and tools of `{"messages": […], "tools": […]}`, or of the list of messages alone; `-` is stdin.

    Raises:
        ConversationError: no such file, or no conversation in it.
    """
    from modeling_mistral_large.errors import ConversationError
    from modeling_mistral_large.instruct.prompt import build_prompt

    try:
        content = json.loads(sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConversationError(f"{path}: {error}; a conversation is JSON as /save writes it; name one") from error
    messages, tools = (content.get("messages"), content.get("tools")) if isinstance(content, dict) else (content, None)
    if not isinstance(messages, list):
        raise ConversationError(f"{path}: no messages; a conversation is JSON as /save writes it; name one")
    if not isinstance(tools, list | None):
        raise ConversationError(f"{path}: tools is not a list; tools are definitions as OpenAI has them; pass a list")
    build_prompt(messages, tools)
    return messages, tools
