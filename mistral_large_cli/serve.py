"""`mistral-large serve`: vLLM with what a Mistral Large checkpoint needs, or our own server."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mistral_large_conversion.checkpoint.adapter_folder import refuse_second_adapter
from mistral_large_conversion.checkpoint.hub import reachable_options
from mistral_large_conversion.checkpoint.layout import is_consolidated
from mistral_large_conversion.errors import MissingLibraryError

from .generation_session import adapter_remark
from .model_argument import check_adapter, check_model
from .options import (
    DTYPES,
    TORCH_DTYPES,
    Adapter,
    CacheDir,
    Dtype,
    Model,
    Revision,
    Token,
    hub_options,
)
from .serve_here import ServerSettings, check_options, serve_here
from .serve_vllm import (
    CONSOLIDATED_OPTIONS,
    TOOL_OPTIONS,
    ServedAdapter,
    base_of_adapter,
    refuse_unserved_adapter,
    served_adapter,
    vllm_lora_options,
    vllm_tokenizer_options,
)
from .speculation import Draft, Drafting, DraftRevision, DraftTokens, Lookup
from .terminal import print_error

Engine = Literal["auto", "vllm", "transformers"]

# What our server needs next to transformers, in setup.py's extra `serve`.
SERVER_LIBRARIES = ("fastapi", "uvicorn")
API_KEY_VARIABLE = "MISTRAL_LARGE_API_KEY"


def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[
        Engine, typer.Option(help="auto: vLLM if it is installed, else our own server, which transformers also names.")
    ] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar=API_KEY_VARIABLE, help="Key that clients have to send; none without it.")
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name of the model in requests instead of MODEL; several may be given.")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights instead of the checkpoint's.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="Our server: where the weights go, as accelerate names it.")
    ] = None,
    kv: Annotated[
        Literal["auto", "fp8"] | None, typer.Option(help="Our server: KV-cache dtype, the model's or FP8.")
    ] = None,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(min=1, help="Our server: most tokens of a prompt read between two steps of the others."),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Our server: most responses at once; others wait.")
    ] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Our server: site whose pages may ask, * for all; several may be given.")
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="Our server: a chat page on the same port.")] = False,
    draft: Draft = None,
    lookup: Lookup = False,
    draft_tokens: DraftTokens = None,
    adapter: Adapter = None,
    revision: Revision = None,
    draft_revision: DraftRevision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Serve a model with OpenAI's API; further options are vLLM's own and are passed on to it unchanged."""
    hub = hub_options(model, revision, token, cache_dir, draft=draft)
    drafting = Drafting.read(draft, lookup, draft_tokens, draft_revision, hub)
    # Engines have no options of their own for these, or another one each.
    os.environ.update(
        {name: str(value) for name, value in {"HF_TOKEN": token, "HF_HUB_CACHE": cache_dir}.items() if value}
    )

    given_model, options = model, reachable_options(model, hub)
    base = base_of_adapter(model, options)
    lora = None
    if base is not None:
        if adapter is not None:
            refuse_second_adapter(model, adapter, Path(model))
        lora = served_adapter(model, base, options)
        # That of the adapter.
        model, revision, options = base, None, reachable_options(base, {})
    elif adapter is not None:
        check_adapter(model, adapter)
        lora = served_adapter(adapter, model, {name: hub[name] for name in ("token", "cache_dir") if name in hub})
    chosen = choose_engine(engine)
    if drafting is not None and drafting.draft is not None:
        check_model(drafting.draft, drafting.hub, None)
        drafting.check(model)
    settings = ServerSettings(device_map, kv, prefill_chunk, max_batch, tuple(cors_origin or ()), ui)
    names = served_model_name or [model if lora is None else lora.name]
    torch_dtype = None if dtype is None else TORCH_DTYPES[DTYPES[dtype]]
    if chosen == "vllm":
        settings.refuse_with_vllm()
        command = vllm_command(model, options, lora, drafting, revision, context.args)
        command[command.index(model) + 1 : command.index(model) + 1] = ["--host", host, "--port", str(port)]
        command += ["--dtype", torch_dtype] if torch_dtype else []
        command += ["--served-model-name", *served_model_name] if served_model_name else []
        if api_key is not None:
            # Other users of the machine can read arguments.
            os.environ["VLLM_API_KEY"] = api_key
        names = [lora.name] if lora is not None else names
    else:
        check_options(context.args)
        settings.check(drafting)
    announce(chosen, host, port, names[0], has_key=api_key is not None, ui=ui)
    if chosen == "vllm":
        # Instead of this process: signals reach it, and its memory is not held twice.
        os.execv(command[0], command)
        return
    serve_here(
        given_model,
        host=host,
        port=port,
        names=names,
        api_key=api_key,
        dtype=torch_dtype,
        hub=hub,
        adapter=adapter,
        drafting=drafting,
        settings=settings,
    )


def announce(engine: str, host: str, port: int, name: str, *, has_key: bool, ui: bool) -> None:
    """Print what to try when the server is up, and warn of one that anybody may ask."""
    from ipaddress import ip_address

    try:
        is_own = ip_address(host).is_loopback
    except ValueError:
        is_own = host == "localhost"
    if not is_own and not has_key:
        print_error(
            f"warning: whoever reaches {host}:{port} may use the model; {API_KEY_VARIABLE} or --api-key asks for a key"
        )
    asked = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    request = json.dumps({"model": name, "messages": [{"role": "user", "content": "Who are you?"}]})
    key = f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if has_key else ""
    typer.echo(f"{engine} on {host}:{port}. When it is up:\n")
    if ui:
        typer.echo(f"http://{asked}:{port}/ is a chat page\n")
    typer.echo(
        f"curl http://{asked}:{port}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{request}'\n"
    )
    sys.stdout.flush()


def vllm_command(
    model: str,
    options: dict[str, Any],
    lora: ServedAdapter | None,
    drafting: Drafting | None,
    revision: str | None,
    further: list[str],
) -> list[str]:
    """Return the command that starts vLLM, but for its address.

    options: those of `reachable_options` for the model; `further` are passed on unchanged.

    Raises:
        MistralLargeError: what vLLM cannot serve.
    """
    if Path(model).is_dir():
        refuse_unserved_adapter(Path(model), None if lora is None else lora.folder)
    lora_options = () if lora is None else vllm_lora_options(lora, model)
    if lora is not None:
        typer.echo(adapter_remark(lora.given, model, lora.base), err=True)
    has_consolidated = Path(model).is_dir() and is_consolidated(Path(model))
    tokenizer = () if has_consolidated else vllm_tokenizer_options(model, options, further)
    speculation = () if drafting is None else drafting.vllm_options(model)
    layout = CONSOLIDATED_OPTIONS if has_consolidated else ()
    version = () if revision is None else ("--revision", revision, "--tokenizer-revision", revision)
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
        *(*TOOL_OPTIONS, *layout, *tokenizer, *version, *lora_options, *speculation, *further),
    ]


def choose_engine(engine: Engine) -> Literal["vllm", "transformers"]:
    """Return the engine that is asked for or, if any will do, the faster one that is installed."""
    if engine != "transformers" and find_spec("vllm") is not None:
        return "vllm"
    if engine != "vllm" and all(find_spec(library) is not None for library in SERVER_LIBRARIES):
        return "transformers"
    own = "pip install 'modeling-mistral-large[serve]'"
    wanted = {
        "vllm": "vLLM is not installed; run pip install vllm",
        "transformers": f"what our server needs is not installed; run {own}",
    }
    problem = wanted.get(engine, f"{wanted['vllm']}, or {own}")
    raise MissingLibraryError(f"serve: {problem}")
