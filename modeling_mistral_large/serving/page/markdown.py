"""Markdown to HTML that is safe to show: whatever a text says, nothing in it runs, and nothing is fetched."""

from collections.abc import Sequence
from html import escape
from typing import Any
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

LINK_SCHEMES = ("http", "https", "mailto")
# Some lexers take time that grows faster than their input does.
HIGHLIGHTED_CHARACTERS = 20_000
# Style sheets give the classes their colours: a page without inline styles can forbid them.
_FORMATTER = HtmlFormatter(nowrap=True)


def to_html(text: str) -> str:
    """Return a text as HTML: CommonMark, tables and strikethrough, code with the classes of Pygments.

    HTML in the text is text, links have one of LINK_SCHEMES, and images are named instead of loaded.
    """
    return str(_RENDERER.render(text))


def _is_link(address: str) -> bool:
    try:
        return urlsplit(address).scheme.lower() in LINK_SCHEMES
    except ValueError:
        return False


def _highlight(code: str, language: str, _: str) -> str:
    """Return code in spans; an empty string leaves it to markdown-it, which escapes it."""
    if not language or len(code) > HIGHLIGHTED_CHARACTERS:
        return ""
    try:
        return str(highlight(code, get_lexer_by_name(language, stripnl=False), _FORMATTER))
    except ClassNotFound:
        return ""


class _Renderer(RendererHTML):
    def image(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        token = tokens[idx]
        name = self.renderInlineAsText(token.children, options, env)
        return f'<span class="image">image: {escape(name or str(token.attrs.get("src", "")))}</span>'

    def link_open(self, tokens: Sequence[Token], idx: int, options: Any, env: Any) -> str:
        tokens[idx].attrSet("rel", "noopener noreferrer")
        tokens[idx].attrSet("target", "_blank")
        return self.renderToken(tokens, idx, options, env)


def _make_renderer() -> MarkdownIt:
    renderer = MarkdownIt("commonmark", {"html": False, "highlight": _highlight}, renderer_cls=_Renderer)
    renderer.enable(["table", "strikethrough"])
    renderer.validateLink = _is_link  # type: ignore[method-assign, assignment]  # the documented way
    return renderer


_RENDERER = _make_renderer()
