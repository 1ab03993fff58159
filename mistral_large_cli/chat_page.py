"""`mistral-large chat --web`: the chat page of our own server, on a free port of this machine."""

import sys
import threading
from collections.abc import Mapping
from typing import Any

import typer

from mistral_large_conversion.errors import SettingError

from .serve_here import ServerSettings, serve_here
from .speculation import Drafting

HOST = "127.0.0.1"
# Options of the chat that the page has a place for, or has not at all.
IN_PAGE = ("system", "load", "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed")
TERMINAL_ONLY = (
    *("tools", "mcp", "yes", "max_rounds", "commands", "plain", "no_history", "repetition_penalty", "stop"),
)


def chat_on_page(
    context: typer.Context,
    model: str,
    *,
    dtype: str,
    hub: Mapping[str, Any],
    adapter: str | None,
    drafting: Drafting | None,
) -> None:
    """Serve a model on a free port of this machine and open its chat page in the browser, until it is stopped.

    context: of the command `chat`, whose options it reads.

    Raises:
        SettingError: an option that has no effect on the page.
        MissingLibraryError: what the server needs is not installed.
    """
    given = [name for name in context.params if _is_given(context, name)]
    for name in given:
        option = f"--{name.replace('_', '-')}"
        if name in IN_PAGE:
            raise SettingError(f"{option}: has no effect with --web; the page has it; set it there")
        if name in TERMINAL_ONLY:
            raise SettingError(f"{option}: has no effect with --web; it is the terminal's; leave one of the two out")
    chosen = {name: context.params[name] for name in ("device_map", "kv", "prefill_chunk") if name in given}
    settings = ServerSettings(**chosen, ui=True)
    settings.check(drafting)
    serve_here(
        model,
        host=HOST,
        port=0,
        names=[model],
        dtype=None if dtype == "auto" else dtype,
        hub=hub,
        adapter=adapter,
        drafting=drafting,
        settings=settings,
        on_port=_open_when_up,
    )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _open_when_up(port: int) -> None:
    address = f"http://{HOST}:{port}/"
    typer.echo(f"The chat page is {address} when the model is loaded. Ctrl-C ends it.")
    sys.stdout.flush()

    def wait() -> None:
        import webbrowser
        from http.client import HTTPConnection, HTTPException

        # The socket listens before the model is loaded: the response comes when it is.
        connection = HTTPConnection(HOST, port)
        try:
            connection.request("GET", "/health")
            connection.getresponse()
        except (OSError, HTTPException):
            # The server ended first.
            return
        finally:
            connection.close()
        webbrowser.open(address)

    threading.Thread(target=wait, daemon=True).start()
