"""`mistral-large serve`: vLLM or `transformers serve` with what a Mistral Large checkpoint needs."""

import inspect
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import CacheDir, Model, Revision, Token, hub_options

Engine = Literal["auto", "vllm", "transformers"]

# Calls as tool_calls, and no tools in the prompt of a request that wants none called.
TOOL_OPTIONS = (
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "mistral"),
    "--exclude-tools-when-tool-choice-none",
)
CONSOLIDATED_OPTIONS = ("--load-format", "mistral", "--config-format", "mistral", "--tokenizer-mode", "mistral")
# What `transformers serve` needs next to transformers.
SERVER_LIBRARIES = ("fastapi", "uvicorn", "openai", "pydantic")


def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[Engine, typer.Option(help="auto: vLLM if it is installed.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Serve a model with OpenAI's API; further options are the engine's own and are passed on unchanged."""
    hub = hub_options(model, revision, token, cache_dir)
    # Engines have no options of their own for these, or another one each.
    os.environ.update(
        {name: str(value) for name, value in {"HF_TOKEN": token, "HF_HUB_CACHE": cache_dir}.items() if value}
    )
    from mistral_large_conversion.checkpoint.hub import reachable_options, refuse_adapter
    from mistral_large_conversion.checkpoint.layout import is_consolidated
    from mistral_large_conversion.errors import CheckpointError

    options = reachable_options(model, hub)
    # Only a repository has to be looked for with the library.
    adapter = Path(model)
    if not adapter.is_dir():
        from modeling_mistral_large.adapter_loading import adapter_folder

        adapter = adapter_folder(model, options) or adapter
    refuse_adapter(adapter, name=model)
    chosen = choose_engine(engine)
    has_consolidated = Path(model).is_dir() and is_consolidated(Path(model))
    if chosen == "transformers" and has_consolidated:
        raise CheckpointError(
            f"{model}: transformers serve does not read the consolidated layout; convert it with `mistral-large "
            "convert`, or install vLLM"
        )
    request = json.dumps({"model": model, "messages": [{"role": "user", "content": "Who are you?"}]})
    typer.echo(f"{chosen} on {host}:{port}. When it is up:\n")
    typer.echo(f"curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'\n")
    sys.stdout.flush()
    if chosen == "transformers":
        serve_with_transformers(model, host=host, port=port, revision=revision, options=context.args)
        return
    layout = CONSOLIDATED_OPTIONS if has_consolidated else ()
    version = () if revision is None else ("--revision", revision, "--tokenizer-revision", revision)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
        *("--host", host, "--port", str(port)),
        *(*TOOL_OPTIONS, *layout, *version, *context.args),
    ]
    # Instead of this process: signals reach it, and its memory is not held twice.
    os.execv(command[0], command)


def choose_engine(engine: Engine) -> Literal["vllm", "transformers"]:
    """Return the engine that is asked for or, if any will do, the faster one that is installed."""
    from mistral_large_conversion.errors import MissingLibraryError

    if engine != "transformers" and find_spec("vllm") is not None:
        return "vllm"
    if engine != "vllm" and all(find_spec(library) is not None for library in SERVER_LIBRARIES):
        return "transformers"
    wanted = {
        "vllm": "vLLM is not installed; run pip install vllm",
        "transformers": "what `transformers serve` needs is not installed; run pip install 'transformers[serving]'",
    }
    problem = wanted.get(engine, f"{wanted['vllm']}, or pip install 'transformers[serving]'")
    raise MissingLibraryError(f"serve: {problem}")


def serve_with_transformers(
    checkpoint: str, *, host: str, port: int, revision: str | None = None, options: Sequence[str] = ()
) -> None:
    """Run `transformers serve` on a checkpoint of ours until it is stopped; `options` are that command's.

    revision: of a repository on the hub.

    It loads the class that config.json names out of the module `transformers`, and imports no other package. What it
    would drop of a request is refused, and so are its other routes; see `serve_guard`.

    Raises:
        ImportError: what the server needs is not installed.
        SettingError: an option that it does not know, or that would have no effect.
        CheckpointError: no such checkpoint, or one that cannot be loaded.
    """
    # It puts a new module `transformers` instead of the old one when it is imported, so that comes first.
    import transformers.processing_utils  # noqa: F401
    from transformers.cli.serving import server
    from transformers.cli.transformers import app

    import modeling_mistral_large
    from mistral_large_conversion.errors import CheckpointError, MistralLargeError

    from . import serve_guard

    serve_guard.check_options(options)
    model_class = modeling_mistral_large.MistralLargeForCausalLM
    setattr(sys.modules["transformers"], model_class.__name__, model_class)
    build_server = server.build_server

    def build_guarded_server(*arguments: Any, **keywords: Any) -> Any:
        built = build_server(*arguments, **keywords)
        given = inspect.signature(build_server).bind(*arguments, **keywords).arguments
        (loaded,) = given["model_manager"].loaded_models.values()
        serve_guard.guard(
            built,
            chat_handler=given["chat_handler"],
            loaded=loaded,
            name=checkpoint,
            revision=revision,
            host=host,
            allows_all_origins=given.get("enable_cors", False),
        )
        return built

    server.build_server = build_guarded_server
    # transformers' own notation.
    wanted = checkpoint if revision is None else f"{checkpoint}@{revision}"
    try:
        app(["serve", wanted, "--host", host, "--port", str(port), *options])
    except MistralLargeError:
        raise
    # transformers raises these for whatever it does not find, and torch for a device that is not there.
    except (OSError, ValueError, RuntimeError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{checkpoint}: cannot be served ({problem}); pass a folder of the HF layout, or a repository"
        ) from error
    finally:
        server.build_server = build_server
