"""What stands between a client and the server of transformers: each request is obeyed, or refused with the reason.

By itself that server computes prompts beyond the model's context, and has routes for anyone to load and unload models.
Here a request is read strictly, see `chat_requests`; what is passed on to the server is only what it obeys.
"""

import json
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mistral_large_conversion.errors import MistralLargeError
from modeling_mistral_large import MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError

from .chat_requests import SEED_NAME, ChatRequest, RequestError, generation_options, read_chat_request

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse

CHAT_ROUTE = "/v1/chat/completions"
OPEN_ROUTES = (CHAT_ROUTE, "/health")
DEFAULT_MAX_TOKENS = 1024


class ChatGuard:
    """The handler of chat completions, with strict requests in front of it.

    handler: of transformers; its `handle_request` takes the JSON of a request.
    model, tokenizer: those that are served under `name`.
    name_inside: what the handler calls them.
    """

    def __init__(
        self, handler: Any, model: Any, tokenizer: MistralLargeTokenizer, name: str, *, name_inside: str
    ) -> None:
        self._handle = handler.handle_request
        self._model = model
        self._tokenizer = tokenizer
        self._name = name
        self._name_inside = name_inside
        handler.handle_request = self.handle_request
        # By itself it drops images, names and the text next to calls, and joins text chunks with a space.
        handler.get_processor_inputs_from_messages = lambda messages, _: messages
        handler.chunk_to_sse = partial(event_with_finish_reason, name=name)
        build_completion = handler._build_completion
        handler._build_completion = lambda *args, **kwargs: build_completion(*args, **kwargs) | {"model": name}
        _seed_when_generating(model)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request, or raise RequestError or ConversationError."""
        if body.get("model") not in (None, self._name):
            raise RequestError(f"model: {body['model']!r} is not served here; the model is {self._name!r}", "model")
        request = read_chat_request(body)
        # As the server makes it.
        prompt = self._tokenizer.apply_chat_template(
            request.messages, tools=request.tools, add_generation_prompt=True, return_dict=False
        )
        of_model = json.loads(self._model.generation_config.to_json_string(ignore_metadata=True))
        options = generation_options(request, of_model, self._max_tokens(request, len(prompt)))
        passed_on = {
            "model": self._name_inside,
            "messages": request.messages,
            "stream": request.is_streamed,
            "generation_config": json.dumps(options),
        }
        return await self._handle(passed_on | ({"tools": request.tools} if request.tools else {}), request_id)

    def _max_tokens(self, request: ChatRequest, prompt_tokens: int) -> int:
        """Return the most tokens that a response may have."""
        context = self._model.config.max_position_embeddings
        if prompt_tokens >= context:
            raise RequestError(
                f"messages: {prompt_tokens} tokens; the model reads fewer than {context}; send less", "messages"
            )
        room = context - prompt_tokens
        if request.max_tokens is not None and request.max_tokens > room:
            raise RequestError(
                f"max_tokens: {request.max_tokens} after a prompt of {prompt_tokens} tokens; the context has "
                f"{context}; ask for at most {room}",
                "max_tokens",
            )
        own = self._model.generation_config.max_new_tokens or 0
        return request.max_tokens or min(room, max(own, DEFAULT_MAX_TOKENS))


def _seed_when_generating(model: Any) -> None:
    """Have the model set the seed of a request itself: until then, those before it in the queue draw random numbers."""
    import torch

    generate = model.generate

    def generate_seeded(*args: Any, generation_config: Any, **kwargs: Any) -> Any:
        seed = getattr(generation_config, SEED_NAME, None)
        if seed is not None:
            torch.manual_seed(seed)
        return generate(*args, generation_config=generation_config, **kwargs)

    model.generate = generate_seeded


def event_with_finish_reason(chunk: Any, *, name: str) -> str:
    """Return a chunk of a stream as an event; clients ask for `finish_reason`, null until the last one.

    name: of the model, as requests have it.
    """
    content = chunk.model_dump(mode="json", exclude_none=True) | {"model": name}
    for choice in content["choices"]:
        choice.setdefault("finish_reason", None)
    return f"data: {json.dumps(content)}\n\n"


def guard(
    app: "FastAPI",
    *,
    chat_handler: Any,
    loaded: Any,
    tokenizer: MistralLargeTokenizer | None = None,
    checkpoint: str,
    revision: str | None = None,
    name: str,
    name_inside: str,
    host: str,
    allows_all_origins: bool,
) -> None:
    """Close the routes of transformers' server that are not OpenAI's or that it cannot serve right, and check requests.

    loaded: transformers' record of the model: `.model` and `.processor`.
    tokenizer: that of an adapter, which counts instead of the checkpoint's.
    checkpoint, revision: what was loaded.
    name, name_inside: what it is called in requests, and what transformers' server calls it.
    host: the address that is listened on.
    """
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    if tokenizer is not None:
        loaded.processor = tokenizer
    elif not isinstance(loaded.processor, MistralLargeTokenizer):
        # A folder of stock Mistral's type; its template alone would take control strings in texts for control tokens.
        loaded.processor = MistralLargeTokenizer.from_pretrained(checkpoint, revision=revision or "main")
    leave_responses_of_other_formats(loaded.processor)
    ChatGuard(chat_handler, loaded.model, loaded.processor, name, name_inside=name_inside)
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in OPEN_ROUTES]
    entry = {"id": name, "object": "model", "created": 0, "owned_by": "local"}

    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    def describe_model(asked: str) -> dict[str, Any]:
        if asked != name:
            raise HTTPException(404, f"model {asked!r} is not served here; the model is {name!r}")
        return entry

    async def refuse(_: "Request", error: Exception) -> "JSONResponse":
        is_of_client = isinstance(error, RequestError | ConversationError)
        return error_response(400 if is_of_client else 500, str(error), getattr(error, "parameter", None))

    async def refuse_body(_: "Request", error: Any) -> "JSONResponse":
        return error_response(400, f"the body is no JSON object: {error.errors()[0]['msg']}; correct it")

    async def refuse_route(request: "Request", error: Any) -> "JSONResponse":
        message = str(error.detail)
        if error.status_code == 404 and message == "Not Found":
            message = f"{request.url.path}: not served; there are {', '.join((*OPEN_ROUTES, '/v1/models'))}"
        return error_response(error.status_code, message)

    async def refuse_foreign_pages(request: "Request", call_next: Any) -> Any:
        origin = request.headers.get("origin")
        if origin is None or allows_all_origins or is_own_origin(origin, request.headers.get("host", ""), host):
            return await call_next(request)
        return error_response(403, f"origin {origin}: pages of other sites may not ask; --enable-cors lets them")

    app.add_api_route("/v1/models", list_models)
    app.add_api_route("/v1/models/{asked:path}", describe_model)
    app.add_exception_handler(MistralLargeError, refuse)
    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_route)
    app.middleware("http")(refuse_foreign_pages)


def leave_responses_of_other_formats(tokenizer: MistralLargeTokenizer) -> None:
    """Have responses be plain text where a chat template of its own ends prompts otherwise than v3 and v7 do.

    The parser of transformers would take such a prompt for the beginning of the response.
    """
    template = tokenizer.response_template
    if tokenizer.prompt_format is not None or template is None:
        return
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], add_generation_prompt=True, return_dict=False
    )
    anchors = template.get("start_anchor") or ()
    ids: Any = tokenizer.convert_tokens_to_ids([anchors] if isinstance(anchors, str) else list(anchors))
    if not {*ids} & {*prompt}:
        tokenizer.response_template = None


def is_own_origin(origin: str, asked_host: str, host: str) -> bool:
    """Return whether a page was loaded from this server, and not under a name that was made to lead to it."""
    parts = urlsplit(origin)
    return parts.netloc == asked_host and (not _is_loopback(host) or _is_loopback(parts.hostname or ""))


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def error_response(status: int, message: str, parameter: str | None = None) -> "JSONResponse":
    """Return an error in the shape of OpenAI's API."""
    from fastapi.responses import JSONResponse

    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": parameter, "code": None}}, status)


# What `transformers serve` is asked for at its start, and why not here.
REFUSED_OPTIONS = {
    "--continuous-batching": "its requests would all be sampled as the first one is",
    "--cb-": "there is no continuous batching",
    "--chat-template-kwargs": "the prompts are those of the vendor's reference",
    "--reasoning": "the format has no place for reasoning",
    "--decision-config": "its route is closed",
    "--model-timeout": "a model that is named stays loaded",
    "--non-blocking": "the command runs until it is stopped",
}
ENGINE_OPTIONS = (
    *("--attn-implementation", "--compile", "--no-compile", "--quantization", "--device", "--dtype"),
    *("--trust-remote-code", "--no-trust-remote-code", "--enable-cors", "--no-enable-cors", "--log-level"),
    "--default-seed",
)


def check_options(options: Sequence[str]) -> None:
    """Refuse options for `transformers serve` that it does not know, or that have no effect here.

    Raises:
        SettingError: with the options that there are.
    """
    from mistral_large_conversion.errors import SettingError

    for option in options:
        name = option.partition("=")[0]
        if not name.startswith("-") or name in ENGINE_OPTIONS or name.lstrip("-").isdigit():
            continue
        reason = next((why for refused, why in REFUSED_OPTIONS.items() if name.startswith(refused)), "no such option")
        raise SettingError(f"{name}: {reason}; leave it out; options for this engine are {', '.join(ENGINE_OPTIONS)}")
