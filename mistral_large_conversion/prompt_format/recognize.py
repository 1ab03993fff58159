"""Tell the prompt format of a chat template by what it renders.

A few conversations are rendered and compared with v3's and v7's prompts; white space does not count, as both formats
encode each text on its own. A template is someone else's program: it runs in a process with limits, see `render`.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from mistral_large_conversion.chat_templates import prompt_format_of
from mistral_large_conversion.vocabulary import BOS, EOS, UNKNOWN

_SCRIPT = Path(__file__).with_name("render.py")
# Of the wall, however busy the machine is; `render` limits the time of the processor.
_WALL_SECONDS = 60
_LARGEST_OUTPUT = 10_000_000

_SYSTEM, _FIRST, _REPLY, _LAST = "Sysmessage", "Firstquestion", "Replytofirst", "Secondquestion"
_TOOL = {
    "type": "function",
    "function": {"name": "probetool", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


class RecognizedFormat(NamedTuple):
    """The prompt format of a folder, "v3", "v7" or None for that of its own template, and why, in words."""

    name: str | None
    reason: str


def recognize_prompt_format(
    template: str | None, vocabulary: str | None, tokens: Mapping[str, str] | None = None
) -> RecognizedFormat:
    """Return the prompt format of a chat template.

    template: of the folder, or None if it has none.
    vocabulary: its name, or None for an unknown one, for which no format is known.
    tokens: special tokens by their names in templates, such as `bos_token`.
    """
    if vocabulary is None:
        return RecognizedFormat(None, "the vocabulary is neither v3's nor v7's")
    if template is None:
        return RecognizedFormat(vocabulary, f"no chat template; the vocabulary is {vocabulary}'s")
    if (name := prompt_format_of(template)) is not None:
        if name == "v7" and vocabulary == "v3":
            return _own("a template of v7, whose control tokens the v3 vocabulary does not have")
        return RecognizedFormat(name, "the chat template is one of this package")
    return _recognize(template, vocabulary, tuple(sorted((tokens or {}).items())))


@lru_cache(maxsize=64)
def _recognize(template: str, vocabulary: str, tokens: tuple[tuple[str, str], ...]) -> RecognizedFormat:
    rendered = _render(template, {"bos_token": BOS, "eos_token": EOS, "unk_token": UNKNOWN, **dict(tokens)})
    if isinstance(rendered, str):
        return _own(rendered)
    plain, finished, with_system, with_tools = (
        None if text is None else "".join(text.split()).removeprefix(BOS) for text in rendered
    )
    # Without white space and <s>, which the tokenizer puts where the template does not.
    turns = f"[INST]{_FIRST}[/INST]{_REPLY}{EOS}[INST]", f"{_LAST}[/INST]"
    if plain is None:
        return _own("the chat template refuses a plain conversation")
    if plain != "".join(turns) or finished != f"[INST]{_FIRST}[/INST]{_REPLY}{EOS}":
        return _own("the chat template writes turns in another format than [INST] …[/INST] …</s>")
    has_tools = with_tools is not None and with_tools != f"[INST]{_FIRST}[/INST]"
    if has_tools and not str(with_tools).startswith("[AVAILABLE_TOOLS]"):
        return _own("the chat template writes tools in another format than [AVAILABLE_TOOLS] …[/AVAILABLE_TOOLS]")
    if with_system is None or with_system == plain:
        does = "refuses" if with_system is None else "ignores"
        return RecognizedFormat(
            vocabulary, f"the chat template writes [INST] turns and {does} system messages; the vocabulary decides"
        )
    if with_system == f"[SYSTEM_PROMPT]{_SYSTEM}[/SYSTEM_PROMPT]{plain}":
        if vocabulary == "v7":
            return RecognizedFormat("v7", "the chat template writes a [SYSTEM_PROMPT] block")
        return _own("the chat template writes a [SYSTEM_PROMPT] block, which the v3 vocabulary has no tokens for")
    but = "" if vocabulary == "v3" else f", though the vocabulary is {vocabulary}'s"
    if with_system == f"{turns[0]}{_SYSTEM}{turns[1]}":
        return RecognizedFormat("v3", f"the chat template puts the system message into the last user message{but}")
    if with_system == f"[INST]{_SYSTEM}{plain.removeprefix('[INST]')}":
        return RecognizedFormat(
            "v3",
            "the chat template puts the system message into a user message, though into the first one where v3 takes "
            f"the last{but}",
        )
    return _own("the chat template writes system messages in another format than v3 or v7")


def _own(reason: str) -> RecognizedFormat:
    return RecognizedFormat(None, reason)


def _render(template: str, tokens: Mapping[str, str]) -> list[str | None] | str:
    """The texts of the probes: plain, finished, with a system message, with a tool; or what went wrong."""
    system, first, reply, last = (
        {"role": role, "content": content}
        for role, content in (("system", _SYSTEM), ("user", _FIRST), ("assistant", _REPLY), ("user", _LAST))
    )
    # As transformers passes them: what is not given is None.
    common: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
    conversations: list[dict[str, Any]] = [
        {**common, "messages": [first, reply, last]},
        {**common, "messages": [first, reply], "add_generation_prompt": False},
        {**common, "messages": [system, first, reply, last]},
        {**common, "messages": [first], "tools": [_TOOL]},
    ]
    request = {"path": sys.path, "template": template, "tokens": dict(tokens), "conversations": conversations}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_SCRIPT)],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=_WALL_SECONDS,
        )
        if done.returncode == 0 and len(done.stdout) < _LARGEST_OUTPUT:
            rendered: list[str | None] = json.loads(done.stdout)
            return rendered
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return "the chat template could not be tried"
    lines = done.stderr.strip().splitlines()
    if "jinja2" in done.stderr and lines and "Error" in lines[-1]:
        return f"the chat template is none for jinja2: {lines[-1][:200]}"
    return "the chat template did not end within the limits of time and memory"
