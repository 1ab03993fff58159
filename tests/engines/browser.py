"""A real Chromium without a screen, and a user of the chat page in it."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SECONDS = 20
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
# Before any script of the page: what must never happen is written down.
WATCH = """
window.alarms = [];
for (const name of ['alert', 'confirm', 'prompt']) {
  window[name] = (...given) => { alarms.push([name, ...given]); return true; };
}
document.addEventListener('securitypolicyviolation', (event) => alarms.push(['violation', event.blockedURI]));
addEventListener('error', (event) => alarms.push(['error', event.message]));
addEventListener('unhandledrejection', (event) => alarms.push(['rejection', String(event.reason)]));
"""


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """Run a browser with a new profile; what it downloads is in `folder`/downloads."""
    options = webdriver.ChromeOptions()
    binary = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        raise RuntimeError("chromium and chromedriver are needed; .ci/page installs them")
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}", "--window-size=1280,900"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder / "downloads")})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    try:
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        yield browser
    finally:
        browser.quit()


class Page:
    """The chat page as a user has it: what is seen, typed and pressed."""

    def __init__(self, browser: webdriver.Chrome, url: str, folder: Path) -> None:
        self.browser = browser
        self.url = url
        self.folder = folder
        browser.get("about:blank")
        browser.get(url)
        self.until(lambda: self.text("model") != "Chat")

    def until(self, holds: Any) -> Any:
        """Wait until `holds()` is true, and return it."""
        return WebDriverWait(self.browser, SECONDS, 0.05, ignored_exceptions=[Exception]).until(lambda _: holds())

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def text(self, id: str) -> str:
        return str(self.find(f"#{id}").text).strip()

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def fill(self, selector: str, text: str) -> None:
        """Type a text in the place of what is there, and leave the field."""
        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.DELETE, text)
        self.run("arguments[0].dispatchEvent(new Event('change'))", field)

    def paste(self, selector: str, text: str) -> None:
        """Paste a text, and leave the field: `send_keys` has no characters beyond the basic plane."""
        self.run(
            "arguments[0].value = arguments[1]; for (const name of ['input', 'change']) "
            "arguments[0].dispatchEvent(new Event(name, {bubbles: true}))",
            self.find(selector),
            text,
        )

    def say(self, text: str, *, wait: bool = True) -> None:
        """Send a message, and wait until the model has responded."""
        self.fill("#input", text)
        self.find("#input").send_keys(Keys.ENTER)
        if wait:
            self.wait_for_response()

    def wait_for_response(self) -> None:
        self.until(lambda: self.find("#messages").get_attribute("aria-busy") == "false")
        self.until(lambda: not any(each.text for each in self.all(".rest")))

    def press(self, name: str, message: int) -> None:
        """Press a button of a message, counted from 0; negative ones from the end."""
        article = self.all("#messages > *")[message]
        (button,) = [each for each in article.find_elements(By.TAG_NAME, "button") if _name(each) == name]
        self.run("arguments[0].scrollIntoView()", button)
        self.browser.execute_script("arguments[0].click()", button)

    def messages(self) -> list[str]:
        """What is read of each message, without its buttons."""
        return [
            "\n".join(part.text for part in article.find_elements(By.CSS_SELECTOR, ".text, .call")).strip()
            for article in self.all("#messages > .message")
        ]

    def settle_tools(self, text: str) -> str:
        """Paste definitions of tools, and return what is said of them."""
        before = self.text("tools-note")
        self.paste("#tools", text)
        self.until(lambda: self.text("tools-note") != before)
        return self.text("tools-note")

    def open_file(self, path: Path) -> None:
        self.find("#conversation-file").send_keys(str(path))

    def save(self) -> Path:
        """Save the conversation, and return the file."""
        downloads = self.folder / "downloads"
        before = set(downloads.glob("*.json"))
        self.find("#save").click()
        (path,) = self.until(lambda: {*downloads.glob("*.json")} - before)
        assert isinstance(path, Path)
        return path

    def alarms(self) -> list[Any]:
        """Dialogs that were opened, scripts that were blocked, and errors of the page."""
        return json.loads(self.run("return JSON.stringify(alarms)"))  # type: ignore[no-any-return]


def _name(button: Any) -> str:
    # Buttons that are transparent until the pointer is there have no visible text.
    return str(button.get_attribute("textContent"))
