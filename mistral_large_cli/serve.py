"""The servers of others on our checkpoints."""

import inspect
import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import typer

Engine = Literal["auto", "vllm", "transformers"]

# Calls as tool_calls, and no tools in the prompt of a request that wants none called.
TOOL_OPTIONS = (
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "mistral"),
    "--exclude-tools-when-tool-choice-none",
)
CONSOLIDATED_OPTIONS = ("--load-format", "mistral", "--config-format", "mistral", "--tokenizer-mode", "mistral")
# What `transformers serve` needs beside transformers.
SERVER_LIBRARIES = ("fastapi", "uvicorn", "openai", "pydantic")


def serve(model: str, *, engine: Engine, host: str, port: int, options: Sequence[str]) -> None:
    """Serve a checkpoint with OpenAI's API until stopped, with vLLM or, without that, with `transformers serve`.

    options: go to the engine's own command unchanged.

    Raises:
        MissingLibraryError: the engine is not installed, or none is.
        CheckpointError: a layout that the engine does not read, or no checkpoint.
        SettingError: an option that the engine does not know, or that would have no effect.
    """
    from mistral_large_conversion.checkpoint.hub import reachable_options, refuse_adapter
    from mistral_large_conversion.checkpoint.layout import is_consolidated
    from mistral_large_conversion.errors import CheckpointError
    from modeling_mistral_large.adapter_loading import adapter_folder

    adapter = adapter_folder(model, reachable_options(model, {}))
    if adapter is not None:
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
        serve_with_transformers(model, host=host, port=port, options=options)
        return
    command = vllm_command(model, host=host, port=port, has_consolidated=has_consolidated, options=options)
    # In the place of this process: signals reach it, and its memory is not held twice.
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
    finding = wanted.get(engine, f"{wanted['vllm']}, or pip install 'transformers[serving]'")
    raise MissingLibraryError(f"serve: {finding}")


def vllm_command(model: str, *, host: str, port: int, has_consolidated: bool, options: Sequence[str]) -> list[str]:
    """Return the command that has vLLM serve a folder of either layout, or a repository."""
    layout = CONSOLIDATED_OPTIONS if has_consolidated else ()
    address = ("--host", host, "--port", str(port))
    return [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        model,
        *address,
        *TOOL_OPTIONS,
        *layout,
        *options,
    ]


def serve_with_transformers(checkpoint: str, *, host: str, port: int, options: Sequence[str] = ()) -> None:
    """Run `transformers serve` on a checkpoint of ours until it is stopped; `options` are that command's.

    It loads the class that config.json names out of the module `transformers`, and imports no other package. What it
    would drop of a request is refused, and so are its other routes; see `serve_guard`.

    Raises:
        ImportError: what the server needs is not installed.
        SettingError: an option that it does not know, or that would have no effect.
        CheckpointError: no such checkpoint, or one that cannot be loaded.
    """
    # It puts a new module `transformers` in the place of the old one when it is imported, so that comes first.
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
            host=host,
            allows_all_origins=given.get("enable_cors", False),
        )
        return built

    server.build_server = build_guarded_server
    try:
        app(["serve", checkpoint, "--host", host, "--port", str(port), *options])
    except MistralLargeError:
        raise
    # transformers raises these for whatever it does not find, and torch for a device that is not there.
    except (OSError, ValueError, RuntimeError) as error:
        finding = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{checkpoint}: cannot be served ({finding}); pass a folder of the HF layout, or a repository"
        ) from error
    finally:
        server.build_server = build_server
