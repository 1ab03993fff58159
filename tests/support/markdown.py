"""The code blocks of the documents, found and judged in one way by the tests and by `.ci`; the standard library only.

    python3 -m tests.support.markdown README.md test

prints the block under `<!-- command: test -->`.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (.+) -->$")


@dataclass(frozen=True)
class Block:
    """language: empty where the page names none. mark: the comment in the line above the block, or an empty text."""

    document: str
    line: int
    language: str
    code: str
    mark: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    def command(self, python: str = "python") -> list[str]:
        """Return what runs the block, stopping at the first command that fails."""
        return [python, "-c", self.code] if self.language == "python" else ["bash", "-euo", "pipefail", "-c", self.code]

    def unprinted(self, stdout: str) -> list[str]:
        """Return the lines that the block promises in comments, `# prints: …`, and that are not in its output."""
        return [line for line in re.findall(r"^# prints: (.+)$", self.code, re.MULTILINE) if line not in stdout]


def blocks(root: Path, document: str) -> Iterator[Block]:
    """Yield every code block of a document, named relative to the root of the repository."""
    text = (root / document).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        before = text[: match.start()]
        mark = _MARK.search(before.rstrip())
        yield Block(document, before.count("\n") + 1, match[1], match[2], mark[1] if mark else "")


def main() -> None:
    document, name = sys.argv[1:]
    found = [block.code for block in blocks(Path(), document) if block.mark == f"command: {name}"]
    if len(found) != 1:
        sys.exit(f"{document}: {len(found)} commands named {name}, must be one; correct it")
    print(found[0], end="")


if __name__ == "__main__":
    main()
