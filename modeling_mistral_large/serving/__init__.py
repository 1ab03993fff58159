"""The server without vLLM: OpenAI's API on a batching engine of this package."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling_mistral_large.serving.app import create_app
    from modeling_mistral_large.serving.batching import ContinuousBatching
    from modeling_mistral_large.serving.one_by_one import OneByOne
    from modeling_mistral_large.serving.requests import GenerationRequest, TokenChoice
    from modeling_mistral_large.serving.server import serve

__all__ = ["ContinuousBatching", "GenerationRequest", "OneByOne", "TokenChoice", "create_app", "serve"]

# Imported when they are asked for: the last two need FastAPI and uvicorn.
MODULES = {
    "ContinuousBatching": "batching",
    "GenerationRequest": "requests",
    "OneByOne": "one_by_one",
    "TokenChoice": "requests",
    "create_app": "app",
    "serve": "server",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module(f"{__name__}.{MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        from modeling_mistral_large.errors import MissingLibraryError

        raise MissingLibraryError(
            f"serving: {error.name} is not installed; the server is built on it; run pip install "
            "'modeling-mistral-large[serve]'"
        ) from error
    return getattr(module, name)
