"""Running the server: the socket first, then the weights, then the routes."""

import asyncio
import socket
from contextlib import suppress
from typing import Any

import uvicorn

from modeling_mistral_large.errors import SettingError
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

from .app import create_app
from .engine_thread import EngineThread

# What a request in progress may take to end, once its generation was ended.
STOP_SECONDS = 3
BACKLOG = 2048


def take_port(host: str, port: int) -> socket.socket:
    """Return a socket that listens; requests wait in it until the server is up.

    Raises:
        SettingError: no such address here, or the port is another program's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        taken = socket.socket(family)
    except OSError as error:
        raise SettingError(f"host {host}: {error.strerror}; pass an address of this machine") from error
    try:
        # A port whose last connections are being closed is free.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Bound alone, another server that is about to start could take it as well.
        taken.listen(BACKLOG)
    except OSError as error:
        taken.close()
        raise SettingError(
            f"{host}:{port}: {error.strerror}; a server listens on an address of this machine and on a port that no "
            "other program has; pass --host or --port, or end that program"
        ) from error
    return taken


def serve(
    model: Any,
    tokenizer: MistralLargeTokenizer,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    listening: socket.socket | None = None,
    log_level: str = "info",
    **options: Any,
) -> None:
    """Serve a model with OpenAI's API until ctrl-C or a signal ends it.

    options: those of `create_app`.
    listening: a socket of `take_port`, where the port was taken before the model was loaded.

    Raises:
        SettingError: the port is taken, or a setting of `create_app`.
    """
    listening = listening or take_port(host, port)
    app = create_app(model, tokenizer, host=host, **options)
    config = uvicorn.Config(
        app, log_level=log_level, timeout_graceful_shutdown=STOP_SECONDS, server_header=False, lifespan="on"
    )
    # Raised again after the server has ended.
    with suppress(KeyboardInterrupt):
        _Server(config, app.state.served.engine).run(sockets=[listening])


class _Server(uvicorn.Server):  # type: ignore[misc, unused-ignore]  # where uvicorn is not installed
    """A server that ends what is being generated before it waits for its requests."""

    def __init__(self, config: uvicorn.Config, engine: EngineThread) -> None:
        super().__init__(config)
        self._engine = engine

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.to_thread(self._engine.close)
        await super().shutdown(sockets)
