"""Files of texts or conversations that models are measured or calibrated with.

| file | samples |
| --- | --- |
| `*.jsonl` | one a line: `{"text": ...}`, or `{"messages": [...], "tools": [...]}`; other keys are ignored |
| `*.json` | one conversation, as `/save` of the chat writes it: `{"messages": [...]}`, or the list of messages |
| any other | one text |
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.source_files import shown
from mistral_large_conversion.errors import SampleFileError

LINE_RULE = 'a line is {"text": "..."} or {"messages": [...]}'
FILE_RULE = "samples are JSON lines (*.jsonl), one conversation (*.json), or plain text (any other name)"
BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Sample:
    """A text, or a conversation as OpenAI's API has it; exactly one of `text` and `messages` is given.

    where: the file, and the number of the line in it.
    """

    where: str
    text: str | None = None
    messages: list[Any] | None = None
    tools: list[Any] | None = None


def read_samples(path: Path | str) -> list[Sample]:
    """Read all samples of a file.

    Raises:
        SampleFileError: a file that cannot be read, is not UTF-8, holds no sample or a line that is none; the message
            has the number of the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SampleFileError(f"{path}: cannot be read: {error.strerror}; {FILE_RULE}; name one") from error
    try:
        text = content.decode("utf-8").removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SampleFileError(
            f"{path} line {line}: byte {content[error.start]:#04x} is not UTF-8; {FILE_RULE}, in UTF-8; convert it"
        ) from error
    if path.suffix == ".jsonl":
        samples = list(_samples_of_lines(path, text))
    elif path.suffix == ".json":
        samples = [_sample(str(path), _parse(str(path), text, FILE_RULE), FILE_RULE)]
    else:
        _refuse_json_lines(path, text)
        samples = [Sample(str(path), text=text)] if text.strip() else []
    if not samples:
        raise SampleFileError(f"{path}: empty; {FILE_RULE}; name a file that holds some")
    return samples


def _samples_of_lines(path: Path, text: str) -> Iterator[Sample]:
    # `splitlines` would also cut at characters that JSON may hold as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            content = _parse(where, line, LINE_RULE)
            if isinstance(content, list):
                raise SampleFileError(f"{where}: {shown(content)}; {LINE_RULE}; put it into an object")
            yield _sample(where, content, LINE_RULE)


def _parse(where: str, text: str, rule: str) -> Any:
    try:
        content = json.loads(text)
        # Half a pair of surrogates has no bytes, so no tokenizer takes it.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "a lone surrogate" if isinstance(error, UnicodeEncodeError) else f"not JSON ({error})"
        raise SampleFileError(f"{where}: {reason}; {rule}; fix or remove it") from error
    return content


def _sample(where: str, content: Any, rule: str) -> Sample:
    if isinstance(content, list):
        content = {"messages": content}
    fields = content if isinstance(content, dict) else {}
    text, messages, tools = (fields.get(name) for name in ("text", "messages", "tools"))
    if (text is None) == (messages is None):
        problem = "neither text nor messages" if text is None else "both text and messages"
        raise SampleFileError(f"{where}: {problem}; {rule}; fix or remove it")
    if text is not None:
        if not isinstance(text, str) or not text.strip():
            raise SampleFileError(f"{where}: text is {shown(text)}; {rule}, and a text is not empty; fix or remove it")
        return Sample(where, text=text)
    if not isinstance(messages, list) or not messages:
        raise SampleFileError(
            f"{where}: messages is {shown(messages)}; {rule}, and messages are a list that is not empty; "
            "fix or remove it"
        )
    if not isinstance(tools, list | None):
        raise SampleFileError(f"{where}: tools is {shown(tools)}; tools are a list of definitions; fix or remove it")
    return Sample(where, messages=messages, tools=tools or None)


def _refuse_json_lines(path: Path, text: str) -> None:
    """Refuse JSON lines under another name: read as a text, they would be measured with their quotes and braces."""
    try:
        first = json.loads(text.strip().split("\n", 1)[0])
    except (ValueError, RecursionError):
        return
    if isinstance(first, dict) and {"text", "messages"} & first.keys():
        raise SampleFileError(f"{path}: holds JSON lines; {FILE_RULE}; rename it to *.jsonl")
