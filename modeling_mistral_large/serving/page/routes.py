"""Routes of the chat page: its files, Markdown as safe HTML, exact prompts, and conversations in files."""

import json
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import MistralLargeError
from modeling_mistral_large.serving.json_fields import RequestError, error_body, read_body
from modeling_mistral_large.serving.page.conversation import prompt_pieces, read_conversation_text, read_tools_text
from modeling_mistral_large.serving.page.markdown import to_html

MEDIA_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
PAGE_HEADERS = {
    # Scripts, styles and requests of this server alone, nothing inline, and HTML through one function of the page.
    "Content-Security-Policy": (
        "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types markdown"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # A new version of the page is there at once.
    "Cache-Control": "no-cache",
}
Body = Mapping[str, Any]


def page_routes(*, tokenizer: MistralLargeTokenizer, model_name: str, context: int) -> APIRouter:
    """Return the routes of the chat page, which itself asks `v1/chat/completions` of the same server.

    model_name: the model's name in requests.
    context: tokens of the model's context.
    """
    static = {
        file.name: (file.read_bytes(), MEDIA_TYPES["." + file.name.rpartition(".")[2]])
        for file in (files(__package__) / "static").iterdir()
    }

    def send(name: str) -> Response:
        content, media_type = static[name]
        return Response(content, media_type=media_type, headers=PAGE_HEADERS)

    async def page() -> Response:
        return send("index.html")

    async def file(name: str) -> Response:
        return send(name) if name in static else _error(404, f"/ui/{name}: no such file; the page is at /ui")

    async def settings() -> Response:
        return _json({"model": model_name, "context": context, "format": tokenizer.prompt_format})

    def markdown(body: Body) -> Response:
        html = to_html(_field(body, "text", str))
        # Half of a surrogate pair is no character, and has no UTF-8.
        return Response(html.encode("utf-8", "replace"), media_type="text/html", headers=PAGE_HEADERS)

    def prompt(body: Body) -> Response:
        tools = _field(body, "tools", list) if body.get("tools") is not None else None
        return _json(prompt_pieces(_field(body, "messages", list), tools, tokenizer))

    def conversation(body: Body) -> Response:
        return _json(read_conversation_text(_field(body, "text", str), tokenizer))

    def tools(body: Body) -> Response:
        return _json(read_tools_text(_field(body, "text", str), tokenizer))

    router = APIRouter(include_in_schema=False)
    # Addresses of the page are relative, so that it also works under a prefix of a proxy.
    router.add_api_route("/", _redirect("ui"))
    router.add_api_route("/ui/", _redirect("../ui"))
    router.add_api_route("/ui", page)
    router.add_api_route("/ui/settings", settings)
    router.add_api_route("/ui/{name}", file)
    for answer in (markdown, prompt, conversation, tools):
        router.add_api_route(f"/ui/{answer.__name__}", _answer_json(answer), methods=["POST"])
    return router


def _redirect(address: str) -> Callable[[], Awaitable[Response]]:
    async def redirect() -> Response:
        return RedirectResponse(address)

    return redirect


def _answer_json(answer: Callable[[Body], Response]) -> Callable[[Request], Awaitable[Response]]:
    """Return a route that takes a JSON object in a thread of its own, with HTTP 400 where it cannot be answered."""

    async def route(request: Request) -> Response:
        try:
            return await run_in_threadpool(answer, await _read_body(request))
        except MistralLargeError as error:
            return _error(400, str(error))

    return route


async def _read_body(request: Request) -> Body:
    body = await read_body(request, "the request")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request: {error}; it must be JSON; correct it") from error
    if not isinstance(content, dict):
        raise RequestError("the request: no JSON object; correct it")
    return content


def _field(body: Body, name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind):
        raise RequestError(f"{name}: must be a {'text' if kind is str else 'list'}; correct it")
    return value


def _json(content: Any, status: int = 200) -> Response:
    # In ASCII, as half of a surrogate pair has no UTF-8.
    headers = {"X-Content-Type-Options": "nosniff"}
    return Response(json.dumps(content), status, media_type="application/json", headers=headers)


def _error(status: int, message: str) -> Response:
    return _json(error_body(status, message), status)
