"""The server without vLLM: OpenAI's API on a batching engine of this package."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modeling_mistral_large.serving.app import create_app
    from modeling_mistral_large.serving.server import serve

__all__ = ["create_app", "serve"]


def __getattr__(name: str) -> Any:
    """Import what needs FastAPI and uvicorn when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        module = import_module(f"{__name__}.{'app' if name == 'create_app' else 'server'}")
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "starlette", "uvicorn"):
            raise
        from modeling_mistral_large.errors import MissingLibraryError

        raise MissingLibraryError(
            f"serving: {error.name} is not installed; the server is built on it; run pip install "
            "'modeling-mistral-large[serve]'"
        ) from error
    return getattr(module, name)
