"""The chat page in a real browser, used as its users do; run by `.ci/page`."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys

from mistral_large_cli.conversation_file import Conversation, load_conversation, read_conversation, save_conversation
from mistral_large_cli.demo import golden_conversations
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.serving.page import routes

from .browser import Page, chromium
from .scripted_chat import CONTEXT, MODEL, Reply, ScriptedChat, scripted_chat

ATTACK = "<img src=x onerror=alert(1)><script>alert(2)</script><svg/onload=alert(3)>"
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "x-weight": 1.0}}}]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[webdriver.Chrome, Path]]:
    folder = tmp_path_factory.mktemp("browser")
    with chromium(folder) as driver:
        yield driver, folder


@pytest.fixture(scope="module")
def server(demo_tokenizer: MistralLargeTokenizer) -> Iterator[ScriptedChat]:
    with scripted_chat(demo_tokenizer) as chat:
        yield chat


@pytest.fixture
def chat(server: ScriptedChat) -> ScriptedChat:
    server.forget()
    return server


@pytest.fixture
def page(browser: tuple[webdriver.Chrome, Path], chat: ScriptedChat) -> Iterator[Page]:
    driver, folder = browser
    driver.set_window_size(1280, 900)
    page = Page(driver, chat.url, folder)
    page.run("sessionStorage.clear()")
    yield page
    # Nothing was opened, blocked or thrown, whatever a test had it show.
    assert page.alarms() == []
    origins = page.run("return performance.getEntriesByType('resource').map(each => new URL(each.name).origin)")
    assert set(origins) == {chat.url}


def sent(chat: ScriptedChat) -> list[dict[str, Any]]:
    """The messages of the last request."""
    messages: list[dict[str, Any]] = chat.requests[-1]["messages"]
    return messages


def test_a_response_streams_and_its_markdown_and_code_are_rendered(page: Page, chat: ScriptedChat) -> None:
    text = "# Sorting\n\nUse **sorted**:\n\n```python\ndef f(x):\n    return sorted(x)\n```\n\n| a |\n| - |\n| 1 |\n"
    chat.replies = [Reply([text[at : at + 3] for at in range(0, len(text), 3)], pause=0.1)]
    page.say("How?", wait=False)
    page.until(lambda: "Sorting" in page.text("messages") and "Writing" in page.text("messages"))
    page.wait_for_response()
    assert page.find(".markdown h1").text == "Sorting"
    assert page.find(".markdown strong").text == "sorted"
    assert page.find(".markdown pre .k").text == "def"
    assert page.find(".markdown td").text == "1"
    assert chat.requests == [
        {
            "model": MODEL,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": "How?"}],
        }
    ]


def test_code_and_texts_are_copied_to_the_letter(page: Page, chat: ScriptedChat) -> None:
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": chat.url}
    page.browser.execute_cdp_cmd("Browser.grantPermissions", permissions)
    chat.replies = [Reply(["```python\nx  = [1,\n\t2]\n```\n*end*"])]
    page.say("Code?")
    page.find(".code-frame .copy").click()
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
    assert page.browser.execute_async_script(read) == "x  = [1,\n\t2]\n"
    page.run("document.querySelector('.message.assistant > .actions button').click()")
    page.until(lambda: page.browser.execute_async_script(read) == "```python\nx  = [1,\n\t2]\n```\n*end*")


@pytest.mark.parametrize("how", ["button", "escape"])
def test_stop_keeps_what_was_written_and_frees_the_server(page: Page, chat: ScriptedChat, how: str) -> None:
    chat.replies = [Reply(["word "] * 200, pause=0.05), Reply(["next"])]
    page.say("Go", wait=False)
    page.until(lambda: "word word" in page.text("messages"))
    page.find("#stop").click() if how == "button" else page.find("#input").send_keys(Keys.ESCAPE)
    page.wait_for_response()
    assert "stopped" in page.text("messages")
    page.until(lambda: chat.disconnects == 1)
    page.say("On")
    written = sent(chat)[1]["content"]
    assert re.fullmatch("(word ){2,199}", written)
    assert sent(chat) == [
        {"role": "user", "content": "Go"},
        {"role": "assistant", "content": written},
        {"role": "user", "content": "On"},
    ]


def test_stop_before_the_first_token_keeps_the_question_alone(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["late"], pause=60), Reply(["now"])]
    page.say("Go", wait=False)
    page.until(lambda: "Reading the prompt" in page.text("messages"))
    page.find("#stop").click()
    page.until(lambda: "Stopped before the first token" in page.text("error"))
    page.find("#retry").click()
    page.until(lambda: page.messages() == ["Go", "now"])
    assert sent(chat) == [{"role": "user", "content": "Go"}]


def test_keys_send_and_begin_lines(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["a"])]
    field = page.find("#input")
    field.send_keys("   ", Keys.ENTER)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("one", Keys.SHIFT, Keys.ENTER)
    field.send_keys("two")
    assert chat.requests == []
    field.send_keys(Keys.ENTER)
    page.wait_for_response()
    assert sent(chat) == [{"role": "user", "content": "one\ntwo"}]
    assert page.messages() == ["one\ntwo", "a"]
    assert page.run("return document.activeElement.id") == "input"


def test_system_prompt_and_sampling_are_sent_where_they_are_given(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["a"]), Reply(["b"])]
    page.fill("#system", "Be  brief.\n")
    fields = {"temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 7, "seed": 0}
    for name, value in fields.items():
        page.fill(f"#{name}", str(value))
    page.say("Hi")
    expected = [{"role": "system", "content": "Be  brief.\n"}, {"role": "user", "content": "Hi"}]
    base = {"model": MODEL, "stream": True, "stream_options": {"include_usage": True}}
    assert chat.requests == [base | fields | {"messages": expected}]
    page.fill("#system", "")
    for name in fields:
        page.fill(f"#{name}", "")
    page.say("Ho")
    assert chat.requests[1].keys() == {*base, "messages"}
    assert [message["role"] for message in sent(chat)] == ["user", "assistant", "user"]


def test_a_tool_is_called_its_result_typed_in_and_the_response_goes_on(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [
        Reply(["Let me see."], calls=[("weather", '{"place": "Paris", "at": 1.0}'), ("weather", '{"place": "Rome"}')]),
        Reply(["It is 22 and 25."]),
    ]
    assert page.settle_tools(json.dumps(WEATHER)) == "The model may call weather"
    page.say("Weather?")
    paris, rome = '{"place": "Paris", "at": 1.0}', '{\n  "place": "Rome"\n}'
    assert page.messages()[1] == f"Let me see.\ncalls weather\n{paris}\ncalls weather\n{rome}"
    assert not page.find("#input").is_enabled()
    first, second = page.all(".results textarea")
    assert [each.get_attribute("aria-label") for each in (first, second)] == ["Result of weather"] * 2
    first.send_keys('{"degrees": 22.0}')
    second.send_keys("25", Keys.ENTER)
    page.until(lambda: page.messages()[-1] == "It is 22 and 25.")
    assert page.messages()[2:4] == ['{"degrees": 22.0}', "25"]
    # Numbers are those of the model and of the user, which JavaScript would write as 1 and 22.
    assert f'"tools":{json.dumps(WEATHER, indent=2)}}}' in chat.bodies[-1]
    calls = [
        {"id": f"call0000{index}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for index, arguments in enumerate(('{"place": "Paris", "at": 1.0}', '{"place": "Rome"}'))
    ]
    assert sent(chat) == [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call00000", "content": '{"degrees": 22.0}'},
        {"role": "tool", "tool_call_id": "call00001", "content": "25"},
    ]


def test_tools_of_a_file_and_what_is_wrong_with_tools(page: Page, chat: ScriptedChat, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps({"tools": WEATHER}))
    page.find("#tools-file").send_keys(str(path))
    page.until(lambda: page.text("tools-note") == "The model may call weather")
    said = page.settle_tools('[{"type": "function", "function": {"name": "a b"}}]')
    assert "a b" in said
    page.say("Hi", wait=False)
    page.until(lambda: page.text("error").startswith(said))
    assert chat.requests == []
    page.settle_tools("")
    chat.replies = [Reply(["a"])]
    page.find("#retry").click()
    page.until(lambda: page.messages() == ["Hi", "a"])
    assert "tools" not in chat.requests[-1]


def test_regenerate_asks_again_without_the_response(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["a"]), Reply(["b"]), Reply(["c"]), Reply(["d"])]
    page.say("1")
    page.say("2")
    page.press("Regenerate", -1)
    page.until(lambda: page.messages() == ["1", "a", "2", "c"])
    page.press("Regenerate", 1)
    page.until(lambda: page.messages() == ["1", "d"])
    assert sent(chat) == [{"role": "user", "content": "1"}]


def test_continue_has_the_model_go_on_after_its_text(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["half a"], finish_reason="length"), Reply([" sentence."])]
    page.say("Go")
    assert "stopped at max tokens" in page.text("messages")
    page.press("Continue", -1)
    page.until(lambda: page.messages() == ["Go", "half a sentence."])
    assert sent(chat)[-1] == {"role": "assistant", "content": "half a", "prefix": True}


def test_edit_a_message_of_each_role(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(calls=[("weather", '{"place": "Paris"}')]), Reply(["It is 22."])]
    page.say("Paris?")
    page.find(".results textarea").send_keys("22", Keys.ENTER)
    page.until(lambda: page.messages()[-1] == "It is 22.")

    # A result: the model goes on from it.
    chat.replies = [Reply(["It is 30."])]
    page.press("Edit", 2)
    assert page.find(".edit textarea").get_attribute("value") == "22"
    page.fill(".edit textarea", "30")
    page.find(".edit textarea").send_keys(Keys.ENTER)
    page.until(lambda: page.messages()[-1] == "It is 30.")
    assert sent(chat)[-1] == {"role": "tool", "tool_call_id": "call00000", "content": "30"}

    # A response: it stays as it was written.
    page.press("Edit", 3)
    page.fill(".edit textarea", "Thirty.")
    page.find(".edit textarea").send_keys(Keys.ENTER)
    page.until(lambda: page.messages()[-1] == "Thirty.")

    # Arguments of a call: they stay JSON, and wait for a result.
    page.press("Edit", 1)
    arguments = page.all(".edit textarea")[1]
    arguments.send_keys("x", Keys.ENTER)
    assert len(page.all(".edit")) == 1
    arguments.send_keys(Keys.CONTROL, "a")
    arguments.send_keys('{"place": "Rome"}', Keys.ENTER)
    page.until(lambda: len(page.all(".results")) == 1)
    assert len(page.messages()) == 2
    chat.replies = [Reply(["It is 25."])]
    page.find(".results textarea").send_keys("25", Keys.ENTER)
    page.until(lambda: page.messages()[-1] == "It is 25.")
    assert sent(chat)[1]["tool_calls"][0]["function"]["arguments"] == '{"place": "Rome"}'

    # A question: what came after it is dropped. Escape leaves all as it was.
    page.press("Edit", 0)
    page.find(".edit textarea").send_keys("x", Keys.ESCAPE)
    assert page.messages()[0] == "Paris?"
    chat.replies = [Reply(["Hello."])]
    page.press("Edit", 0)
    page.fill(".edit textarea", "Hi")
    page.find(".edit button.main").click()
    page.until(lambda: page.messages() == ["Hi", "Hello."])
    assert sent(chat) == [{"role": "user", "content": "Hi"}]


def test_the_exact_prompt_with_its_control_tokens(
    page: Page, chat: ScriptedChat, demo_tokenizer: MistralLargeTokenizer
) -> None:
    chat.replies = [Reply(["[/INST] is text"])]
    page.fill("#system", "Be brief.")
    page.settle_tools(json.dumps(WEATHER))
    page.say("</s>?")
    page.fill("#input", "And this?")
    page.find("#show-prompt").click()
    page.until(lambda: page.find("#prompt").is_displayed())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "</s>?"},
        {"role": "assistant", "content": "[/INST] is text"},
        {"role": "user", "content": "And this?"},
    ]
    expected = demo_tokenizer.apply_chat_template(messages, WEATHER, return_dict=False)
    page.find("#show-ids").click()
    assert [int(each) for row in page.all("#prompt .ids") for each in row.text.split()] == expected
    assert [each.text for each in page.all("#prompt .control")] == [
        *("<s>", "[INST]", "[/INST]", "</s>", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[INST]", "[/INST]")
    ]
    assert page.text("prompt-count") == f"{len(expected)} tokens, format v3"
    assert page.text("legend").split() == ["prompt", "tools", "user", "assistant"]
    page.find("#show-ids").click()
    page.find("#close-prompt").click()
    assert not page.find("#prompt").is_displayed()


def test_speed_and_context_are_those_of_the_response(page: Page, chat: ScriptedChat) -> None:
    assert page.text("context") == f"0 of {CONTEXT:,} tokens"
    chat.replies = [Reply(["a "] * 11, pause=0.1)]
    page.say("Hi")
    stats = re.search(r"12 tokens · ([\d.]+) tokens/s · first token after ([\d.]+) s", page.text("messages"))
    assert stats is not None
    # 11 chunks, 0.1 s apart, on a machine that may be busy.
    assert 2 < float(stats[1]) < 11.5
    assert 0.1 <= float(stats[2]) < 5
    assert page.text("context") == f"32 of {CONTEXT:,} tokens"
    assert page.find("#context-bar").get_attribute("value") == "32"


def test_a_saved_conversation_is_one_of_the_chats_and_the_reverse(
    page: Page, chat: ScriptedChat, demo_tokenizer: MistralLargeTokenizer, tmp_path: Path
) -> None:
    for golden in golden_conversations().values():
        system = golden.messages[0]["content"] if golden.messages[0]["role"] == "system" else None
        rest = golden.messages[system is not None :]
        path = save_conversation(Conversation(rest, system), str(tmp_path / f"{golden.name}.json"))
        page.run("document.getElementById('new').click()")
        page.open_file(path)
        page.until(lambda rest=rest: len(page.messages()) == len(rest))
        saved = page.save()
        messages, tools = read_conversation(saved, "v3")
        assert tools is None
        assert demo_tokenizer.apply_chat_template(messages, return_dict=False) == (
            demo_tokenizer.apply_chat_template(golden.messages, return_dict=False)
        )
        loaded = Conversation()
        load_conversation(loaded, saved, "v3")
        assert loaded.with_system(loaded.messages) == messages


def test_tools_are_saved_and_opened_with_the_conversation(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(calls=[("weather", '{"at": 1.0}')])]
    page.settle_tools(json.dumps(WEATHER))
    page.say("Weather?")
    saved = page.save()
    content = json.loads(saved.read_text(encoding="utf-8"))
    assert content["tools"] == WEATHER
    assert '"x-weight": 1.0' in saved.read_text(encoding="utf-8")
    assert content["messages"][1]["tool_calls"][0]["function"]["arguments"] == '{"at": 1.0}'
    page.find("#new").click()
    page.settle_tools("")
    page.open_file(saved)
    page.until(lambda: page.text("tools-note") == "The model may call weather")
    chat.replies = [Reply(["22"])]
    page.find(".results textarea").send_keys("22", Keys.ENTER)
    page.until(lambda: page.messages()[-1] == "22")
    assert chat.requests[-1]["tools"] == WEATHER


def test_a_file_that_is_no_conversation_is_refused_with_the_reason(
    page: Page, chat: ScriptedChat, tmp_path: Path
) -> None:
    chat.replies = [Reply(["a"])]
    page.say("Hi")
    for text, reason in (("{", "Expecting"), ('{"messages": [{"role": "alien", "content": ""}]}', "alien")):
        path = tmp_path / "wrong.json"
        path.write_text(text)
        page.open_file(path)
        page.until(lambda reason=reason: reason in page.text("error"))
        assert page.messages() == ["Hi", "a"]


def test_errors_of_the_server_are_shown_and_tried_again(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(error=(400, "temperature: must be smaller; correct it")), Reply(["fine"])]
    page.say("Hi", wait=False)
    page.until(lambda: page.text("error").startswith("temperature: must be smaller; correct it"))
    page.find("#retry").click()
    page.until(lambda: page.messages() == ["Hi", "fine"])
    assert not page.find("#error").is_displayed()
    chat.replies = [Reply(["be", "gun"], error=(200, "out of memory"))]
    page.say("On", wait=False)
    page.until(lambda: page.find("#error").is_displayed())
    assert page.text("error") == "out of memory"
    assert page.messages()[-1] == "begun"
    assert "interrupted" in page.text("messages")


def test_an_empty_response_is_said_and_not_kept(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply([]), Reply(["b"])]
    page.say("Hi", wait=False)
    page.until(lambda: page.text("error").startswith("The response was empty."))
    page.find("#retry").click()
    page.until(lambda: page.messages() == ["Hi", "b"])


def test_a_server_that_is_gone_is_said(
    browser: tuple[webdriver.Chrome, Path], demo_tokenizer: MistralLargeTokenizer
) -> None:
    with scripted_chat(demo_tokenizer) as server:
        page = Page(browser[0], server.url, browser[1])
        server.replies = [Reply(["word "] * 1000, pause=0.05)]
        page.say("Hi", wait=False)
        page.until(lambda: "word" in page.text("messages"))
    page.until(lambda: "in the middle" in page.text("error") or "early" in page.text("error"))
    assert page.messages()[-1].startswith("word")
    page.say("On", wait=False)
    page.until(lambda: "does not respond" in page.text("error"))
    assert page.alarms() == []


def test_a_key_is_asked_for_sent_and_kept_for_the_tab_alone(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(error=(401, "no valid API key")), Reply(["welcome"])]
    page.say("Hi", wait=False)
    page.until(lambda: page.text("error").startswith("no valid API key"))
    page.until(lambda: page.run("return document.activeElement.id") == "key")
    page.fill("#key", "secret")
    page.until(lambda: not page.find("#error").is_displayed())
    page.press("Edit", 0)
    page.find(".edit button.main").click()
    page.until(lambda: page.messages() == ["Hi", "welcome"])
    assert chat.authorizations == [None, "Bearer secret"]
    assert page.run("return Object.values(sessionStorage)") == ["secret"]
    assert page.run("return [localStorage.length, document.cookie]") == [0, ""]
    page.fill("#key", "")
    assert page.run("return sessionStorage.length") == 0


def test_nothing_of_a_conversation_is_kept_by_the_browser(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["a"])]
    page.say("Hi")
    assert page.run("return [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    again = Page(page.browser, page.url, page.folder)
    assert again.messages() == []


@pytest.mark.parametrize("width", [500, 700, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, chat: ScriptedChat, width: int) -> None:
    page.browser.set_window_size(width, 800)
    chat.replies = [Reply(["```\n" + "x" * 500 + "\n```\n" + "y" * 500 + "\n\n|" + "z|" * 60 + "\n|" + "-|" * 60])]
    page.say("w" * 300)
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    assert page.run("const log = document.getElementById('messages'); return log.scrollWidth <= log.clientWidth")
    for button in page.all("header button, #send"):
        assert button.rect["x"] >= 0
        assert button.rect["x"] + button.rect["width"] <= width


def test_settings_are_a_drawer_on_a_narrow_screen(page: Page, chat: ScriptedChat) -> None:
    page.browser.set_window_size(500, 800)
    narrow = Page(page.browser, page.url, page.folder)
    assert not narrow.find("#settings").is_displayed()
    narrow.find("#toggle").click()
    assert narrow.find("#settings").is_displayed()
    assert narrow.find("#toggle").get_attribute("aria-expanded") == "true"


def test_it_is_light_or_dark_as_the_system_is(page: Page) -> None:
    colours = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        read = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
        colours.append(page.run(read))
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    (light_back, light_text), (dark_back, dark_text) = (map(_luminance, each) for each in colours)
    assert light_back > 0.9 > 0.2 > light_text
    assert dark_back < 0.2 < 0.8 < dark_text


def _luminance(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


def test_every_control_has_a_name_for_screen_readers(page: Page, chat: ScriptedChat) -> None:
    chat.replies = [Reply(["```\na\n```"], calls=[("weather", "{}")])]
    page.say("Hi")
    page.press("Edit", 0)
    tree = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if not node.get("ignored") and node["role"]["value"] in ("button", "textbox", "spinbutton", "meter", "checkbox")
    ]
    assert len(controls) > 20
    assert [control for control in controls if not control[1].strip()] == []
    log = page.find("#messages")
    assert (log.get_attribute("role"), log.get_attribute("aria-live")) == ("log", "polite")


def test_nothing_that_anybody_writes_becomes_active(page: Page, chat: ScriptedChat, tmp_path: Path) -> None:
    chat.replies = [
        Reply([ATTACK, "\n\n[x](javascript:alert(4)) ![y](https://evil.example/y.png)\n\n```html\n", ATTACK, "\n```"]),
        Reply(["a"], calls=[(ATTACK, json.dumps({ATTACK: ATTACK}))]),
        Reply([ATTACK]),
        Reply(error=(400, ATTACK)),
    ]
    page.fill("#system", ATTACK)
    page.say(ATTACK)
    page.say("tool")
    page.find(".results textarea").send_keys(ATTACK, Keys.ENTER)
    page.until(lambda: len(page.messages()) == 6)
    page.wait_for_response()
    page.say(ATTACK, wait=False)
    page.until(lambda: page.text("error").startswith(ATTACK))
    page.find("#show-prompt").click()
    page.until(lambda: page.find("#prompt").is_displayed() or "name" in page.text("error"))
    page.settle_tools(json.dumps([{"type": "function", "function": {"name": ATTACK}}]))
    page.settle_tools(ATTACK)
    for content in (
        [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}],
        [{"role": ATTACK, "content": ATTACK}],
        {"messages": [{"role": "user", "content": ATTACK}], "tools": [{"function": {"name": ATTACK}}]},
    ):
        path = tmp_path / "attack & <b>.json"
        path.write_text(json.dumps(content))
        page.run("document.getElementById('prompt').close()")
        page.open_file(path)
        time.sleep(0.5)
    assert page.all("img, iframe, object, embed, #messages script, #messages svg") == []
    assert {each.get_attribute("href") for each in page.all("#messages a")} == set()
    # The fixture looks for dialogs, violations of the policy, and requests to elsewhere.


def test_the_policy_stops_what_the_markdown_would_let_through(
    browser: tuple[webdriver.Chrome, Path], demo_tokenizer: MistralLargeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "to_html", lambda text: text)
    with scripted_chat(demo_tokenizer) as server:
        page = Page(browser[0], server.url, browser[1])
        server.replies = [Reply([ATTACK + "<img src=https://evil.example/x>"])]
        page.say("Hi")
        page.until(lambda: page.all(".markdown img"))
        time.sleep(0.5)
        alarms = page.alarms()
    assert {kind for kind, *_ in alarms} == {"violation"}
    assert ["violation", "https://evil.example/x"] in alarms


def test_chat_web_opens_the_page_of_the_real_server(
    browser: tuple[webdriver.Chrome, Path], demo_folder: Path, tmp_path: Path
) -> None:
    opener, opened = tmp_path / "browser.sh", tmp_path / "opened"
    opener.write_text(f'#!/bin/sh\necho "$1" > {opened}.part && mv {opened}.part {opened}\n')
    opener.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "mistral_large_cli", "chat", str(demo_folder), "--web"],
        env={**os.environ, "BROWSER": f"{opener} %s", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        first_line = process.stdout.readline()
        end = time.monotonic() + 300
        while not opened.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        url = opened.read_text().strip()
        assert first_line.startswith(f"The chat page is {url} ")
        page = Page(browser[0], url, browser[1])
        page.fill("#temperature", "0")
        golden = golden_conversations()
        page.say(golden["who_are_you"].messages[-1]["content"])
        assert page.messages()[-1] == golden["who_are_you"].answer
        page.press("Edit", 0)
        page.settle_tools(json.dumps(golden["weather_call"].tools))
        page.fill(".edit textarea", golden["weather_call"].messages[-1]["content"])
        page.find(".edit textarea").send_keys(Keys.ENTER)
        page.until(lambda: page.all(".results"))
        page.find(".results textarea").send_keys("22", Keys.ENTER)
        page.until(lambda: page.messages()[-1] == golden["weather_answer"].answer)
        page.fill("#max_tokens", "5")
        page.press("Regenerate", -1)
        page.until(lambda: "stopped at max tokens" in page.text("messages"))
        page.fill("#max_tokens", "")
        page.press("Continue", -1)
        page.until(lambda: page.messages()[-1] == golden["weather_answer"].answer)
        page.fill("#temperature", "-1")
        page.press("Regenerate", -1)
        page.until(lambda: page.text("error").startswith("temperature: must be"))
        assert page.alarms() == []
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
