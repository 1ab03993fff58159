"""The server's routes: OpenAI's API for one model, as an application of FastAPI."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from modeling_mistral_large.errors import MistralLargeError, SettingError
from modeling_mistral_large.tokenization_mistral_large import MistralLargeTokenizer

from .access import AccessGuard
from .batching import ContinuousBatching
from .chat_completions import completion_body, completion_events
from .chat_request import ChatRequest, read_chat_request
from .engine_thread import EngineThread
from .json_fields import RequestError, error_body, failure_body, read_body, read_json_object
from .responses_api import response_body, response_events
from .responses_request import read_response_request
from .running import ClientGoneError, EventStream, RunningCompletion, collect
from .served_model import ServedModel

ROUTES = (
    *("POST /v1/chat/completions", "POST /v1/responses"),
    *("GET /v1/models", "GET /v1/models/{name}", "GET /health"),
)
# What a proxy writes into its log of a request whose client has gone.
CLIENT_CLOSED_REQUEST = 499


def create_app(
    model: Any,
    tokenizer: MistralLargeTokenizer,
    *,
    engine: EngineThread | None = None,
    model_names: Sequence[str] = ("mistral-large",),
    host: str | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
    ui: bool = False,
) -> FastAPI:
    """Return the application that serves a model with OpenAI's API.

    engine: generates the responses, `ContinuousBatching` if there is none; it is closed when the application ends.
    model_names: under which the model is asked for; the first is that of responses to requests without one.
    host: the address that is listened on: on a loopback one, other host names are refused, as a page under a name that
        was made to lead to this machine would have. None for no such check.
    api_key: asked for in the header `Authorization: Bearer KEY`; None for none.
    cors_origins: of other sites whose pages may ask, or `*` for all.
    ui: whether the chat page is served at /.

    Raises:
        SettingError: no name, or a key that no header can hold.
        MissingLibraryError: the page needs what is not installed.
    """
    if not model_names:
        raise SettingError("model_names: there are none; requests ask for a model by its name; pass one")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise SettingError("api_key: must be printable ASCII without spaces around it; choose another one")
    served = ServedModel(
        ContinuousBatching(model) if engine is None else engine,
        tokenizer,
        names=model_names,
        generation_config=model.generation_config,
        context=model.config.max_position_embeddings,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.engine.close()

    # Its documents would be fetched from elsewhere.
    app = FastAPI(title="Mistral Large", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.served = served
    _add_routes(app, served)
    _add_errors(app)
    if ui:
        from modeling_mistral_large.serving.page import page_routes

        app.include_router(page_routes(tokenizer=tokenizer, model_name=served.names[0], context=served.context))
    app.add_middleware(AccessGuard, host=host, origins=cors_origins, api_key=api_key)
    if cors_origins:
        # Outside of the guard: a browser asks first, without the key.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


def _add_routes(app: FastAPI, served: ServedModel) -> None:
    created = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        context = {"max_model_len": served.context}
        return {"id": name, "object": "model", "created": created, "owned_by": "mistral-large", **context}

    async def run(chat: ChatRequest) -> RunningCompletion:
        name = served.name_of(chat.model)
        return RunningCompletion(served.engine, name, chat, await asyncio.to_thread(served.prepare, chat))

    async def chat_completions(request: Request) -> Response:
        completion = await run(read_chat_request(await _read_body(request)))
        if completion.request.is_streamed:
            return EventStream(completion, completion_events(completion))
        return JSONResponse(completion_body(completion, await collect(completion, request)))

    async def responses(request: Request) -> Response:
        asked = read_response_request(await _read_body(request))
        completion = await run(asked.chat)
        if asked.chat.is_streamed:
            return EventStream(completion, response_events(asked, completion))
        return JSONResponse(response_body(asked, completion, await collect(completion, request)))

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in served.names]}

    async def describe_model(name: str) -> dict[str, Any]:
        return entry(served.name_of(name))

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/responses", responses, methods=["POST"])
    app.add_api_route("/v1/models", list_models)
    app.add_api_route("/v1/models/{name:path}", describe_model)
    app.add_api_route("/health", health)


async def _read_body(request: Request) -> dict[str, Any]:
    """Return the JSON of a request.

    Raises:
        RequestError: it says that it is something else, is too long, or is no JSON object.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise RequestError(
            f"content-type {kind or 'without a name'}: requests are JSON; send the header Content-Type: "
            "application/json",
            status=415,
        )
    return read_json_object(await read_body(request, "the body"))


def _add_errors(app: FastAPI) -> None:
    async def refuse(_: Request, error: Exception) -> Response:
        status, body = failure_body(error)
        return JSONResponse(body, status)

    async def refuse_route(request: Request, error: Any) -> Response:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"{request.method} {request.url.path}: not served; there are {', '.join(ROUTES)}"
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    async def forget(*_: Any) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    app.add_exception_handler(MistralLargeError, refuse)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(ClientGoneError, forget)
    app.add_exception_handler(Exception, refuse)
