"""Conversations in files, read for the page, and the pieces of their prompts."""

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from mistral_large_conversion.prompt_roles import ROLES
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError
from modeling_mistral_large.instruct import FORMATS

Message = dict[str, Any]


def read_conversation_text(text: str, tokenizer: MistralLargeTokenizer) -> dict[str, Any]:
    """Return `system`, `messages` and `tools` of a file as `/save` of the chat or a client of OpenAI's API writes it.

    Contents and arguments become text and tools one JSON text, because JavaScript would read 1.0 as 1.

    Raises:
        ConversationError: no JSON, or no conversation that has a prompt.
    """
    given = _read_json(text, "the file", "a conversation is JSON as Save writes it; choose one")
    messages, tools = (given.get("messages"), given.get("tools")) if isinstance(given, dict) else (given, None)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConversationError("the file: no messages; a conversation is JSON as Save writes it; choose one")
    if not isinstance(tools, list | None):
        raise ConversationError("the file: tools is not a list; tools are definitions as OpenAI has them; pass a list")
    # Says what the format refuses; the messages below have the same prompt.
    tokenizer.apply_chat_template(messages, tools or None, tokenize=False)
    separator = FORMATS[tokenizer.prompt_format or "v3"].separator
    read = [_plain(message, separator) for message in messages]
    system = read.pop(0)["content"] if read and read[0]["role"] in ("system", "developer") else ""
    return {
        "system": system,
        "messages": read,
        "tools": json.dumps(tools, ensure_ascii=False, indent=2) if tools else "",
    }


def read_tools_text(text: str, tokenizer: MistralLargeTokenizer) -> dict[str, Any]:
    """Return the `names` and the `text` of definitions of tools: a list, alone or under `tools`, or one definition.

    Raises:
        ConversationError: no JSON, or no definitions that have a prompt.
    """
    rule = "tools are a JSON list of definitions as OpenAI has them"
    given = _read_json(text, "tools", f"{rule}; correct them")
    tools = given.get("tools", [given]) if isinstance(given, dict) else given
    if not isinstance(tools, list):
        raise ConversationError(f"tools: no list; {rule}; pass one")
    tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tools or None, tokenize=False)
    names = [str((tool.get("function") or tool)["name"]) for tool in tools]
    return {"names": names, "text": json.dumps(tools, ensure_ascii=False, indent=2) if tools else ""}


def _read_json(text: str, what: str, rule: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{what}: {error}; {rule}") from error


def _plain(message: Mapping[str, Any], separator: str) -> Message:
    """Return a message with a text for its content and for the arguments of each call."""
    plain = {**message, "content": _content(message.get("content"), separator)}
    if message.get("function_call") is not None:
        plain["tool_calls"] = [{"function": plain.pop("function_call")}]
    if plain.get("tool_calls"):
        plain["tool_calls"] = [
            {**call, "type": "function", "function": {**call["function"], "arguments": _arguments(call["function"])}}
            for call in plain["tool_calls"]
        ]
    if plain["role"] == "function":
        plain["role"] = "tool"
    return plain


def _content(content: Any, separator: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(chunk, dict) and chunk.get("type") == "text" for chunk in content):
        return separator.join(filter(None, (chunk["text"] for chunk in content)))
    return json.dumps(content, ensure_ascii=False)


def _arguments(function: Mapping[str, Any]) -> str:
    arguments = function.get("arguments")
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def prompt_pieces(messages: list[Any], tools: list[Any] | None, tokenizer: MistralLargeTokenizer) -> dict[str, Any]:
    """Return the exact prompt of a conversation: `tokens`, how many it has, and its `pieces`.

    A piece is a control token, or the text between two of them: its `text`, its `ids`, whether it `is_control`, and the
    `role` whose part of the prompt it is.

    Raises:
        ConversationError: the conversation has no prompt.
    """
    ids: list[int] = tokenizer.apply_chat_template(messages, tools or None, return_dict=False)
    control_ids = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces: list[dict[str, Any]] = []
    role = "prompt"
    for is_control, group in groupby(ids, key=control_ids.__contains__):
        for part in ([index] for index in group) if is_control else (list(group),):
            text = str(tokenizer.decode(part))
            if is_control:
                role = ROLES.get(text, role)
            pieces.append({"text": text, "ids": part, "is_control": is_control, "role": role})
            if text.startswith("[/") and is_control:
                # What follows an instruction or results, and is no control token, is the assistant's.
                role = "assistant"
    return {"tokens": len(ids), "format": tokenizer.prompt_format, "pieces": pieces}
