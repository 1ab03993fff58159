"""The routes of the chat page: Markdown that stays text, exact prompts, conversations of files, the page's headers."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from mistral_large_cli.conversation_file import read_conversation
from mistral_large_cli.demo import golden_conversations
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.serving.page import markdown as markdown_module
from modeling_mistral_large.serving.page import page_routes
from modeling_mistral_large.serving.page.markdown import to_html

STATIC = Path(markdown_module.__file__).parent / "static"
TAGS = {
    *("p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a", "span"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"),
}
ATTRIBUTES = {
    *(("a", name) for name in ("href", "rel", "target", "title")),
    *(("span", "class"), ("code", "class"), ("ol", "start"), ("td", "style"), ("th", "style")),
}
ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<style>*{background:url(//evil)}</style>",
    "<base href=//evil>",
    "<meta http-equiv=refresh content=0;url=//evil>",
    "<form action=//evil><button>x</button></form>",
    "<details open ontoggle=alert(1)>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<![CDATA[<img src=x onerror=alert(1)>]]>",
    "<?xml version='1.0'?><x onload=alert(1)>",
    "</div></article><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](&#106;avascript:alert(1))",
    "[x](java\nscript:alert(1))",
    "[x](<java&#10;script:alert(1)>)",
    "[x](\x01javascript:alert(1))",
    "[x](&#x6A&#x61;vascript:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](data:image/svg+xml;base64,PHN2Zy8+)",
    "[x](vbscript:x)",
    "[x](file:///etc/passwd)",
    "[x](//evil/x)",
    "[x](/v1/models)",
    "[x](ui/settings)",
    "[x](blob:http://x/y)",
    "[x](http:alert(1))",
    '[x](https://a "\\" onmouseover=alert(1) x=\\"")',
    '[x](https://a/"onmouseover=alert(1))',
    "[x](https://a/<script>)",
    "[<img src=x onerror=alert(1)>](https://a)",
    "[x][1]\n\n[1]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "<https://a/'onmouseover='alert(1)>",
    "![x](https://evil/x.png)",
    "![x](javascript:alert(1))",
    '![<script>alert(1)</script>](https://evil/x.png "<b>")',
    '![" onerror="alert(1)](x)',
    "![![x](https://a)](https://b)",
    "[![x](https://a)](javascript:alert(1))",
    "```html\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\nx\n```',
    "```python onmouseover=alert(1)\nprint('</code></pre><script>alert(1)</script>')\n```",
    "``` '><img/src=x/onerror=alert(1)>\nx\n```",
    "~~~php\n<?php echo '<script>alert(1)</script>'; ?>\n~~~",
    "`<script>alert(1)</script>`",
    "    <script>alert(1)</script>",
    "| <script>alert(1)</script> |\n| --- |\n| <img src=x onerror=alert(1)> |",
    "# <script>alert(1)</script>",
    "> <img src=x onerror=alert(1)>",
    "1. <svg/onload=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "\\<script>alert(1)</script>",
    "<scr\x00ipt>alert(1)</scr\x00ipt>",
    "＜script＞alert(1)＜/script＞",
    "*<img src=x onerror=alert(1)//*>",
    "<img src='x'\nonerror='alert(1)'>",
    "~~<svg/onload=alert(1)>~~",
]


class Elements(HTMLParser):
    """Every element of HTML, with its attributes."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_comment(self, data: str) -> None:
        self.found.append(("comment", {}))

    def handle_decl(self, decl: str) -> None:
        self.found.append(("declaration", {}))

    def handle_pi(self, data: str) -> None:
        self.found.append(("instruction", {}))


def offences(html: str) -> list[Any]:
    """What is none of the elements and attributes that Markdown needs, and links but to sites and mailboxes."""
    found: list[Any] = []
    for tag, attributes in Elements(html).found:
        found += [] if tag in TAGS else [tag]
        found += [(tag, name) for name in attributes if (tag, name) not in ATTRIBUTES]
        if tag == "a":
            found += [] if re.match("(https?|mailto):", attributes["href"] or "") else [attributes["href"]]
            found += [] if attributes.get("rel") == "noopener noreferrer" else ["rel"]
        if "style" in attributes:
            found += [] if re.fullmatch("text-align:(left|right|center)", attributes["style"] or "") else ["style"]
    return found


@pytest.fixture(scope="module")
def client(demo_tokenizer: MistralLargeTokenizer) -> TestClient:
    return make_client(demo_tokenizer)


def make_client(tokenizer: MistralLargeTokenizer) -> TestClient:
    app = FastAPI()
    app.include_router(page_routes(tokenizer=tokenizer, model_name="demo", context=4096))
    return TestClient(app)


@pytest.mark.parametrize("attack", ATTACKS)
def test_markdown_of_an_attack_holds_nothing_active(client: TestClient, attack: str) -> None:
    response = client.post("/ui/markdown", json={"text": attack})
    assert response.status_code == 200
    assert offences(response.text) == []


def test_what_is_active_is_found() -> None:
    """The oracle of the tests around it."""
    assert offences('<p onclick="x">') == [("p", "onclick")]
    assert offences("<script>x</script><!-- x --><!doctype x><?x>") == [
        "script",
        "comment",
        "declaration",
        "instruction",
    ]
    assert offences('<a href="javascript:x">') == ["javascript:x", "rel"]
    assert offences('<img src="https://a">') == ["img", ("img", "src")]


FRAGMENTS = [
    *ATTACKS,
    "\n",
    "\n\n",
    "`",
    "```",
    "~~~",
    "[",
    "](",
    ")",
    "<",
    ">",
    '"',
    "'",
    "*",
    "_",
    "|",
    "---",
    "    ",
    "- ",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), max_size=12).map("".join))
def test_markdown_of_any_text_holds_nothing_active(text: str) -> None:
    assert offences(to_html(text)) == []


def test_markdown_is_what_people_expect_of_it() -> None:
    text = "# Title\n\n**bold** ~~gone~~ <https://a.example>\n\n| a |\n| :-: |\n| b |\n\n```python\nx = 1\n```\n\n![view](https://b/x.png)"
    link = '<a href="https://a.example" rel="noopener noreferrer" target="_blank">https://a.example</a>'
    assert to_html(text) == (
        f"<h1>Title</h1>\n<p><strong>bold</strong> <s>gone</s> {link}</p>\n"
        '<table>\n<thead>\n<tr>\n<th style="text-align:center">a</th>\n</tr>\n</thead>\n'
        '<tbody>\n<tr>\n<td style="text-align:center">b</td>\n</tr>\n</tbody>\n</table>\n'
        '<pre><code class="language-python"><span class="n">x</span> <span class="o">=</span> '
        '<span class="mi">1</span>\n</code></pre>\n'
        '<p><span class="image">image: view</span></p>\n'
    )


def test_long_code_is_shown_without_colours() -> None:
    code = "x = 1\n" * markdown_module.HIGHLIGHTED_CHARACTERS
    assert "<span" not in to_html(f"```python\n{code}```")
    assert "<span" in to_html("```python\nx = 1\n```")


@pytest.mark.parametrize("prompt_format", ["v3", "v7"])
def test_the_prompt_is_the_tokenizers(
    prompt_format: str, demo_tokenizer: MistralLargeTokenizer, tokenizer_of_v7: MistralLargeTokenizer
) -> None:
    tokenizer = {"v3": demo_tokenizer, "v7": tokenizer_of_v7}[prompt_format]
    client = make_client(tokenizer)
    for golden in golden_conversations(prompt_format).values():
        body = client.post("/ui/prompt", json={"messages": golden.messages, "tools": golden.tools}).json()
        expected = tokenizer.apply_chat_template(golden.messages, golden.tools, return_dict=False)
        assert [index for piece in body["pieces"] for index in piece["ids"]] == expected, golden.name
        assert (body["tokens"], body["format"]) == (len(expected), prompt_format)
        names = tokenizer.vocabulary.control_tokens
        for piece in body["pieces"]:
            assert piece["is_control"] == (piece["ids"][0] in names.values())
            assert piece["text"] == tokenizer.decode(piece["ids"])


def test_control_strings_in_a_text_are_text_of_its_role(client: TestClient) -> None:
    messages = [{"role": "user", "content": "[/INST] </s>"}, {"role": "assistant", "content": "[INST]"}]
    pieces = client.post("/ui/prompt", json={"messages": messages}).json()["pieces"]
    assert [(piece["text"], piece["is_control"], piece["role"]) for piece in pieces] == [
        ("<s>", True, "prompt"),
        ("[INST]", True, "user"),
        ("[/INST] </s>", False, "user"),
        ("[/INST]", True, "user"),
        ("[INST]", False, "assistant"),
        ("</s>", True, "assistant"),
    ]


@pytest.mark.parametrize("prompt_format", ["v3", "v7"])
def test_a_file_keeps_its_prompt(
    prompt_format: str,
    demo_tokenizer: MistralLargeTokenizer,
    tokenizer_of_v7: MistralLargeTokenizer,
    tmp_path: Path,
) -> None:
    tokenizer = {"v3": demo_tokenizer, "v7": tokenizer_of_v7}[prompt_format]
    client = make_client(tokenizer)
    unusual: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": "a 👋"},
        {
            "role": "assistant",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1.0, "y": 2**70, "z": "ü"}}}],
        },
        {"role": "tool", "content": {"degrees": 22.0, "list": [1e30]}},
        {"role": "assistant", "content": "b", "function_call": None},
        {"role": "user", "content": None},
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1.0}'}},
        {"role": "function", "name": "f", "content": "22"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x-weight": 1.0}}}]
    conversations: list[tuple[Any, Any]] = [(unusual, tools), (unusual, None)]
    conversations += [(golden.messages, golden.tools) for golden in golden_conversations(prompt_format).values()]
    for messages, given_tools in conversations:
        text = json.dumps({"messages": messages, "tools": given_tools})
        read = client.post("/ui/conversation", json={"text": text})
        assert read.status_code == 200, read.text
        body = read.json()
        system = [{"role": "system", "content": body["system"]}] if body["system"] else []
        read_tools = json.loads(body["tools"]) if body["tools"] else None
        assert tokenizer.apply_chat_template([*system, *body["messages"]], read_tools, return_dict=False) == (
            tokenizer.apply_chat_template(messages, given_tools, return_dict=False)
        )
        assert all(isinstance(message["content"], str) for message in body["messages"])
        path = tmp_path / "conversation.json"
        path.write_text(json.dumps({"messages": [*system, *body["messages"]], "tools": read_tools}))
        assert read_conversation(path, prompt_format) == ([*system, *body["messages"]], read_tools)


NO_CONVERSATIONS = [
    *("[1.0", "", "{}", "[]", "[1]", "[" * 100_000, '{"messages": 1}'),
    '{"messages": [{"role": "user", "content": "a"}], "note": NaN}',
    '{"messages": [{"role": "alien", "content": "a"}]}',
    '{"messages": [{"role": "user", "content": "a"}], "tools": 1}',
    '[{"role": "user", "content": "\\ud800"}]',
    '[{"role": "user", "content": [{"type": "image_url"}]}]',
]


@pytest.mark.parametrize("text", NO_CONVERSATIONS)
def test_a_file_without_a_conversation_is_refused_with_the_reason(client: TestClient, text: str) -> None:
    response = client.post("/ui/conversation", json={"text": text})
    assert response.status_code == 400
    assert len(response.json()["error"]["message"].split(";")) >= 2


def test_tools_are_read_as_a_list_alone_or_under_their_name(client: TestClient) -> None:
    definition = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x-weight": 1.0}}}
    for form in ([definition], {"tools": [definition]}, definition):
        body = client.post("/ui/tools", json={"text": json.dumps(form)}).json()
        assert body == {"names": ["f"], "text": json.dumps([definition], indent=2)}
    for wrong in ('[{"type": "function", "function": {"name": "a b"}}]', "{", "3", '{"tools": 3}', "[3]", "{}"):
        response = client.post("/ui/tools", json={"text": wrong})
        assert response.status_code == 400, wrong
        assert ";" in response.json()["error"]["message"]


@pytest.mark.parametrize("route", ["markdown", "prompt", "conversation", "tools"])
@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"text": 1, "messages": 1}', b"\xff", b"[" * 100_000, b"NaN"]
)
def test_a_request_that_cannot_be_read_is_a_reason(client: TestClient, route: str, body: bytes) -> None:
    response = client.post(f"/ui/{route}", content=body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_half_of_a_surrogate_pair_is_no_failure(client: TestClient) -> None:
    assert client.post("/ui/markdown", content=b'{"text": "\\ud800"}').text == "<p>?</p>\n"
    messages = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert client.post("/ui/prompt", content=messages).status_code == 400
    assert client.post("/ui/tools", content=b'{"text": "[\\"\\ud800\\"]"}').status_code == 400


def test_a_body_without_an_end_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_mistral_large.serving.json_fields.MOST_BODY_BYTES", 100)
    response = client.post("/ui/markdown", json={"text": "a" * 100})
    assert (response.status_code, "send less" in response.text) == (400, True)


def test_the_page_is_found_and_everything_it_names_is_there(client: TestClient) -> None:
    for address in ("/", "/ui/"):
        assert client.get(address).url.path == "/ui"
    page = client.get("/ui").text
    named = set(re.findall(r'(?:href|src)="([^"]+)"', page))
    for path in STATIC.glob("*.js"):
        named |= {f"ui/{name}" for name in re.findall(r"from '\./([^']+)'", path.read_text(encoding="utf-8"))}
    assert named == {f"ui/{path.name}" for path in STATIC.iterdir() if path.name != "index.html"}
    for address in named:
        response = client.get(f"/{address}")
        assert response.status_code == 200
        assert response.content == (STATIC / address.removeprefix("ui/")).read_bytes()
    assert client.get("/ui/settings").json() == {"model": "demo", "context": 4096, "format": "v3"}


@pytest.mark.parametrize("address", ["/ui/x", "/ui/..%2froutes.py", "/ui/%2e%2e/routes.py", "/ui/routes.py", "/ui/a/b"])
def test_no_other_file_is_served(client: TestClient, address: str) -> None:
    assert client.get(address).status_code == 404


def test_the_page_may_load_nothing_from_elsewhere_and_run_nothing_inline(client: TestClient) -> None:
    policy = (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types markdown"
    )
    for address in ("/ui", "/ui/chat.js", "/ui/icon.svg"):
        headers = client.get(address).headers
        assert headers["content-security-policy"] == policy
        assert headers["x-content-type-options"] == "nosniff"
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "//" not in re.sub(r"^\s*//.*$|(?<=[;)]) // .*$", "", text, flags=re.MULTILINE), path.name
        assert not re.search(r"<script>|<style>|\sstyle=|\son\w+=|eval\(|new Function|insertAdjacentHTML", text), (
            path.name
        )
    assert sum(path.read_text(encoding="utf-8").count("innerHTML") for path in STATIC.iterdir()) == 1
