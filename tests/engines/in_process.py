"""Our server in a thread of the test's process, so that a test sees its model, too."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import uvicorn
from openai import OpenAI

from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.serving import create_app
from modeling_mistral_large.serving.server import take_port

from .servers import HOST, free_port

NAME = "demo"


@dataclass(frozen=True)
class InProcess:
    """A running server with its model."""

    port: int
    model: Any
    tokenizer: MistralLargeTokenizer

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"http://{HOST}:{self.port}/v1", api_key="none", max_retries=0, timeout=120)

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON, or the text of a stream, of the response to a request as bytes or JSON."""
        connection = HTTPConnection(HOST, self.port, timeout=120)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
        try:
            connection.request(method, path, data, given)
            response = connection.getresponse()
            text = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json else text.decode()
        finally:
            connection.close()

    def chat(self, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
        """Status and JSON of the response to a request for a chat completion."""
        return self.send("POST", "/v1/chat/completions", {"model": NAME, **body}, **headers)


@contextmanager
def serving(model: Any, tokenizer: MistralLargeTokenizer, **options: Any) -> Iterator[InProcess]:
    """Serve a model until the context ends; `options` are those of `create_app`."""
    port = free_port()
    app = create_app(model, tokenizer, **{"model_names": [NAME], "host": HOST, **options})
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [take_port(HOST, port)]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield InProcess(port, model, tokenizer)
    finally:
        server.should_exit = True
        thread.join()
