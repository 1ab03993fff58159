"""The pictures of docs/chat-page.md: the demo model's responses, and for Markdown those of a script.

python -m tests.engines.page_pictures, in the environment of `.ci/page`
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from selenium.webdriver.common.keys import Keys

from mistral_large_cli.demo import convert_demo_checkpoint, golden_conversations
from modeling_mistral_large import MistralLargeTokenizer

from .browser import Page, chromium
from .scripted_chat import Reply, scripted_chat
from .servers import free_port, running

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
SIZE = (1180, 860)
NARROW = (500, 900)
MARKDOWN = """\
Partition around a **pivot**, then sort both sides:

```python
def quicksort(items: list[int]) -> list[int]:
    if len(items) < 2:
        return items
    pivot, *rest = items
    low = [x for x in rest if x < pivot]
    high = [x for x in rest if x >= pivot]
    return [*quicksort(low), pivot, *quicksort(high)]
```

| case | comparisons |
| --- | --- |
| average | `n log n` |
| worst | n² |
"""


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = convert_demo_checkpoint(folder / "Mistral-Large-demo")
        port = free_port()
        command = [sys.executable, "-m", "mistral_large_cli", "serve", str(model), "--engine", "transformers", "--ui"]
        with (
            running("demo", [*command, "--port", str(port)], port=port, log_file=folder / "log") as server,
            chromium(folder) as browser,
        ):
            browser.set_window_size(*SIZE)
            page = Page(browser, server.url, folder)
            picture_tools(page)
            picture_prompt(page)
            with scripted_chat(MistralLargeTokenizer.from_pretrained(model)) as chat:
                chat.replies = [Reply([MARKDOWN[at : at + 4] for at in range(0, len(MARKDOWN), 4)], pause=0.02)]
                features = [{"name": "prefers-color-scheme", "value": "dark"}]
                browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                browser.set_window_size(*NARROW)
                page = Page(browser, chat.url, folder)
                page.say("Write quicksort in Python.")
                page.run("document.activeElement.blur(); document.getElementById('messages').scrollTop = 0")
                save(page, "chat-page-narrow")


def picture_tools(page: Page) -> None:
    golden = golden_conversations()["weather_call"]
    page.fill("#temperature", "0")
    page.settle_tools(json.dumps(golden.tools, indent=2))
    page.say(golden.messages[-1]["content"])
    page.find(".results textarea").send_keys("22", Keys.ENTER)
    page.until(lambda: len(page.messages()) == 4)
    page.wait_for_response()
    page.run("document.activeElement.blur(); document.getElementById('messages').scrollTop = 0")
    save(page, "chat-page")


def picture_prompt(page: Page) -> None:
    page.find("#show-prompt").click()
    page.until(lambda: page.find("#prompt").is_displayed())
    page.run("document.activeElement.blur()")
    save(page, "chat-page-prompt")


def save(page: Page, name: str) -> None:
    page.browser.save_screenshot(str(PICTURES / f"{name}.png"))


if __name__ == "__main__":
    main()
