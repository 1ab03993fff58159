"""Who may ask the server: pages of which origins, under which host names, with which key."""

import hmac
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers

from .json_fields import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class AccessGuard:
    """ASGI middleware that refuses pages of other sites, names that lead to this machine, and requests without the key.

    host: the address that is listened on; None where the app is part of another server, which then checks names.
    origins: those of other sites whose pages may ask, or `*`.
    api_key: None for no key. What is read without one: the page and /health, so everything but /v1 and what is posted.
    """

    def __init__(
        self, app: "ASGIApp", *, host: str | None = None, origins: Sequence[str] = (), api_key: str | None = None
    ) -> None:
        self._app = app
        self._host = host
        self._origins = frozenset(origins)
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        refusal = self._refusal(scope) if scope["type"] in ("http", "websocket") else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: "Scope") -> JSONResponse | None:
        headers = Headers(scope=scope)
        asked_host, origin = headers.get("host", ""), headers.get("origin")
        # Where a key is asked for, a page under a name of its own has none.
        is_local = self._api_key is None and self._host is not None and is_loopback(self._host)
        if is_local and not is_loopback(_split(f"//{asked_host}").hostname or ""):
            return _refuse(
                403,
                f"host {asked_host}: this server listens on {self._host} and is no other one; ask it under that "
                "address, or have it started with an API key",
            )
        if origin is not None and not self._knows(origin, asked_host):
            return _refuse(
                403, f"origin {origin}: pages of other sites may not ask; --cors-origin {origin} lets this one"
            )
        if self._api_key is not None and not self._may_enter(scope, headers):
            return _refuse(
                401,
                "no valid API key: send the header Authorization: Bearer KEY with the key of this server",
                "invalid_api_key",
            )
        return None

    def _knows(self, origin: str, asked_host: str) -> bool:
        if {origin, "*"} & self._origins:
            return True
        return _split(origin).netloc == asked_host

    def _may_enter(self, scope: "Scope", headers: Headers) -> bool:
        is_open = scope["method"] in ("GET", "HEAD") and not scope["path"].startswith("/v1")
        if scope["type"] == "http" and is_open:
            return True
        assert self._api_key is not None
        kind, _, key = headers.get("authorization", "").partition(" ")
        is_key = hmac.compare_digest(key.strip().encode("utf-8", "replace"), self._api_key)
        return kind.lower() == "bearer" and is_key


def is_loopback(host: str) -> bool:
    """Return whether an address or a name is this machine's own for itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split(address: str) -> SplitResult:
    """Return the parts of an address, empty ones of what is none."""
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")


def _refuse(status: int, message: str, code: str | None = None) -> JSONResponse:
    headers: dict[str, Any] = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse(error_body(status, message, code=code), status, headers=headers)
