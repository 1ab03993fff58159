"""docs/pictures/chat-terminal.svg: the screen of a chat with the demo model at a pseudo-terminal.

python -m tests.repository.chat_picture
"""

import os
import re
import sys
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mistral_large_cli.demo import convert_demo_checkpoint
from tests.cli.test_chat_terminal import TOOLS, WEATHER
from tests.support.terminal import Terminal, terminal_with

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "chat-terminal.svg"
COLUMNS, LINES = 88, 22
# A picture must not ask the network for its letters.
WEB_FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def picture_of(terminal: Terminal) -> str:
    """Return the screen as SVG."""
    console = Console(record=True, width=COLUMNS, file=StringIO(), force_terminal=True, color_system="truecolor")
    for line in terminal.styled_lines():
        console.print(Text.assemble(*line))
    return WEB_FONTS.sub("", console.export_svg(title="mistral-large chat", unique_id="chat-terminal"))


def chat_on(terminal: Terminal) -> None:
    """Type what the picture shows."""
    terminal.wait_for_prompt()
    terminal.send("Who are you?")
    terminal.type(f"{WEATHER}\r")
    terminal.wait_until(lambda: terminal.last_line.endswith("[a]lways"))
    terminal.type("y\r")
    terminal.wait_for_prompt()
    terminal.paste("A paste of\nseveral lines\nis one message.")
    terminal.wait_for("is one message.")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert_demo_checkpoint(folder / "toy-hf")
        (folder / "my_tools.py").write_text(TOOLS)
        options = "--temperature 0 --no-history --tools my_tools.py"
        script = f"cd {folder} && exec {sys.executable} -m mistral_large_cli chat toy-hf {options} 2>/dev/null"
        environment = {**os.environ, "PYTHONPATH": str(PICTURE.parents[2]), "HF_HUB_OFFLINE": "1"}
        with terminal_with(["sh", "-c", script], environment, columns=COLUMNS, lines=LINES) as (terminal, _):
            chat_on(terminal)
            PICTURE.write_text(picture_of(terminal), encoding="utf-8")


if __name__ == "__main__":
    main()
