"""`mistral-large serve`: vLLM or `transformers serve` with what a Mistral Large checkpoint needs."""

import inspect
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import typer

from .generation_session import load_model
from .model_argument import check_adapter, check_model
from .options import Adapter, CacheDir, Model, Revision, Token, hub_options
from .speculation import Draft, Drafting, DraftRevision, DraftTokens, Lookup
from .terminal import printable

Engine = Literal["auto", "vllm", "transformers"]

# Calls as tool_calls, and no tools in the prompt of a request that wants none called.
TOOL_OPTIONS = (
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "mistral"),
    "--exclude-tools-when-tool-choice-none",
)
CONSOLIDATED_OPTIONS = ("--load-format", "mistral", "--config-format", "mistral", "--tokenizer-mode", "mistral")
# The ranks that vLLM reserves memory for.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
# What `transformers serve` needs next to transformers.
SERVER_LIBRARIES = ("fastapi", "uvicorn", "openai", "pydantic")


def serve(
    context: typer.Context,
    model: Model,
    engine: Annotated[Engine, typer.Option(help="auto: vLLM if it is installed.")] = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    draft: Draft = None,
    lookup: Lookup = False,
    draft_tokens: DraftTokens = None,
    adapter: Adapter = None,
    revision: Revision = None,
    draft_revision: DraftRevision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Serve a model with OpenAI's API; further options are the engine's own and are passed on unchanged."""
    hub = hub_options(model, revision, token, cache_dir, draft=draft)
    drafting = Drafting.read(draft, lookup, draft_tokens, draft_revision, token, cache_dir)
    # Engines have no options of their own for these, or another one each.
    os.environ.update(
        {name: str(value) for name, value in {"HF_TOKEN": token, "HF_HUB_CACHE": cache_dir}.items() if value}
    )
    from mistral_large_conversion.checkpoint.adapter_folder import refuse_second_adapter
    from mistral_large_conversion.checkpoint.hub import reachable_options
    from mistral_large_conversion.checkpoint.layout import is_consolidated

    options = reachable_options(model, hub)
    base = base_of_adapter(model, options)
    lora = None
    if base is not None:
        if adapter is not None:
            refuse_second_adapter(model, adapter, Path(model))
        lora = served_adapter(model, base, options, has_tokenizer=True)
        # That of the adapter.
        model, revision, options = base, None, reachable_options(base, {})
    elif adapter is not None:
        check_adapter(model, adapter)
        lora = served_adapter(adapter, model, {name: hub[name] for name in ("token", "cache_dir") if name in hub})
    chosen = choose_engine(engine)
    if drafting is not None and drafting.draft is not None:
        check_model(drafting.draft, drafting.hub, None)
        drafting.check(model)
    if chosen == "vllm" and Path(model).is_dir():
        refuse_unserved_adapter(Path(model), None if lora is None else lora.folder)
    lora_options = () if lora is None or chosen == "transformers" else vllm_lora_options(lora, model)
    if lora is not None:
        typer.echo(lora.remark(model), err=True)
    has_consolidated = Path(model).is_dir() and is_consolidated(Path(model))
    tokenizer = (
        () if chosen == "transformers" or has_consolidated else vllm_tokenizer_options(model, options, context.args)
    )
    request = json.dumps(
        {"model": model if lora is None else lora.name, "messages": [{"role": "user", "content": "Who are you?"}]}
    )
    typer.echo(f"{chosen} on {host}:{port}. When it is up:\n")
    typer.echo(f"curl http://{host}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'\n")
    sys.stdout.flush()
    if chosen == "transformers":
        with_draft = {} if drafting is None else {"drafting": drafting}
        serve_with_transformers(
            model, host=host, port=port, revision=revision, options=context.args, adapter=lora, **with_draft
        )
        return
    speculation = () if drafting is None else drafting.vllm_options(model)
    layout = CONSOLIDATED_OPTIONS if has_consolidated else ()
    version = () if revision is None else ("--revision", revision, "--tokenizer-revision", revision)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model),
        *("--host", host, "--port", str(port)),
        *(*TOOL_OPTIONS, *layout, *tokenizer, *version, *lora_options, *speculation, *context.args),
    ]
    # Instead of this process: signals reach it, and its memory is not held twice.
    os.execv(command[0], command)


def base_of_adapter(model: str, options: dict[str, Any]) -> str | None:
    """Return the base of the adapter in `model`, a folder or a repository, None where it is a checkpoint.

    Raises:
        CheckpointError: an adapter that names none.
    """
    from mistral_large_conversion.checkpoint.hub import refuse_adapter
    from mistral_large_conversion.checkpoint.source_files import adapter_problem, read_adapter_base

    folder = Path(model)
    # Only a repository has to be looked for with the library.
    if not folder.is_dir():
        from modeling_mistral_large.adapter_loading import adapter_folder

        folder = adapter_folder(model, options) or folder
    if adapter_problem(folder) is None:
        return None
    base = read_adapter_base(folder)
    if base is None:
        refuse_adapter(folder, name=model)
    return base


def refuse_unserved_adapter(folder: Path, adapter: Path | None) -> None:
    """Refuse a checkpoint with an adapter next to it, which vLLM passes over or takes for weights.

    adapter: the folder of the one that is served.

    Raises:
        CheckpointError: such a folder, unless it is that adapter's.
    """
    from mistral_large_conversion.checkpoint.adapter_folder import ADAPTER_MARKS, adapter_layout
    from mistral_large_conversion.errors import CheckpointError

    layout = adapter_layout(folder)
    if layout is None or (layout == "hf" and adapter is not None and adapter.resolve() == folder.resolve()):
        return
    mark = ADAPTER_MARKS[layout]
    way_out = f"give --adapter {folder}, or move {mark} elsewhere" if layout == "hf" else f"move {mark} elsewhere"
    raise CheckpointError(f"{folder}: holds {mark} next to the checkpoint, which vLLM would not apply; {way_out}")


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is served on a base.

    given: as the user named it.
    folder: where it is on this machine.
    name: the model's name in requests.
    base: that which it names where it is called otherwise than the one it is served on, else None.
    tokenizer_place: options of `from_pretrained` with which its own tokenizer is loaded, else None: then the base's.
    """

    given: str
    folder: Path
    name: str
    base: str | None
    tokenizer_place: dict[str, Any] | None

    def remark(self, base: str) -> str:
        """Return the line that says what is loaded on what."""
        note = "" if self.base is None else f"; it names {printable(self.base)} as its base"
        return f"{printable(self.given)}: an adapter, loaded on {printable(base)}{note}"


def served_adapter(adapter: str, model: str, options: dict[str, Any], *, has_tokenizer: bool = False) -> ServedAdapter:
    """Return how an adapter, a folder or a repository, is served on a base.

    options: those of `from_pretrained` for it.
    has_tokenizer: whether its own tokenizer counts, if it was saved with one.

    Raises:
        CheckpointError: no adapter, or one that is not available.
    """
    from mistral_large_conversion.checkpoint.adapter_folder import is_other_base, require_adapter
    from mistral_large_conversion.checkpoint.hub import resolve_adapter
    from mistral_large_conversion.checkpoint.source_files import read_adapter_base
    from mistral_large_conversion.errors import CheckpointError

    folder, name = resolve_adapter(adapter, **options)
    require_adapter(folder)
    try:
        base = read_adapter_base(folder)
    except CheckpointError:
        # It names none, or cannot be read, which loading it says.
        base = None
    base = base if is_other_base(base, model) else None
    return ServedAdapter(adapter, folder, name, base, options if has_tokenizer else None)


def vllm_lora_options(lora: ServedAdapter, model: str) -> tuple[str, ...]:
    """Return how vLLM is told of an adapter of PEFT.

    Raises:
        CheckpointError: an adapter that it does not load, and the way out.
    """
    from mistral_large_conversion.checkpoint.adapter_config import largest_rank
    from mistral_large_conversion.checkpoint.adapter_folder import adapter_layout
    from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME, read_json_object
    from mistral_large_conversion.errors import CheckpointError

    if adapter_layout(lora.folder) == "consolidated":
        raise CheckpointError(
            f"{lora.given}: vLLM loads adapters of PEFT only; convert it with `mistral-large convert {lora.given} "
            "DESTINATION --to hf` and give that, or take --engine transformers"
        )
    path = lora.folder / ADAPTER_CONFIG_NAME
    try:
        rank = largest_rank(read_json_object(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; save or download it again") from error
    largest = next((each for each in VLLM_RANKS if each >= rank), None)
    if largest is None:
        raise CheckpointError(
            f"{lora.given}: rank {rank}, vLLM loads adapters up to {VLLM_RANKS[-1]}; merge it with `mistral-large "
            f"convert {model} DESTINATION --adapter {lora.given}` and serve that, or take --engine transformers"
        )
    module = f"{lora.name}={lora.folder.absolute()}"
    return ("--enable-lora", "--max-lora-rank", str(largest), "--lora-modules", module)


def vllm_tokenizer_options(model: str, hub: dict[str, Any], options: Sequence[str]) -> tuple[str, ...]:
    """Return how vLLM is told to take our prompts for a checkpoint of type `mistral`, of which it takes stock ones.

    model: a folder or repository in the HF layout; `hub` are the options of `reachable_options` for it.
    options: those that are passed on to vLLM.

    Raises:
        CheckpointError: our tokenizer does not know the folder's vocabulary.
        TokenizerFileError: a folder whose tokenizer cannot be read.
    """
    from mistral_large_conversion.checkpoint.hub import find_small_file
    from mistral_large_conversion.checkpoint.layout import CONFIG_NAME
    from mistral_large_conversion.checkpoint.params import PARAMS_NAME
    from mistral_large_conversion.checkpoint.source_files import file_problem, read_json_object
    from mistral_large_conversion.errors import CheckpointError
    from mistral_large_conversion.folder_tokenizer import read_folder_tokenizer

    names = {option.partition("=")[0].replace("_", "-") for option in options}
    if names & {"--tokenizer", "--tokenizer-mode"}:
        return ()
    config = find_small_file(model, CONFIG_NAME, hub)
    if config is None or file_problem(config.parent, config.name):
        return ()
    try:
        model_type = read_json_object(config).get("model_type")
    except (OSError, ValueError):
        # vLLM says what is wrong with it.
        return ()
    # A repository with both layouts is consolidated for vLLM, as a folder is.
    if model_type != "mistral" or (not Path(model).is_dir() and find_small_file(model, PARAMS_NAME, hub) is not None):
        return ()
    if Path(model).is_dir():
        tokenizer = read_folder_tokenizer(model, layout="hf")
        if tokenizer.vocabulary is None:
            raise CheckpointError(
                f"{model}: {tokenizer.remarks[-1]}; prompts of vLLM would be no better; add --tokenizer-mode hf to "
                "serve it so"
            )
    return ("--tokenizer-mode", "mistral_large")


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
    checkpoint: str,
    *,
    host: str,
    port: int,
    revision: str | None = None,
    options: Sequence[str] = (),
    adapter: ServedAdapter | None = None,
    drafting: Drafting | None = None,
) -> None:
    """Run `transformers serve` on a checkpoint of ours until it is stopped; `options` are that command's.

    revision: of a repository on the hub.
    adapter: a LoRA to be loaded on it, which then has the model's name in requests.
    drafting: what drafts tokens for the model.

    It loads the class that config.json names out of the module `transformers`, and imports no other package. What it
    would drop of a request is refused, and so are its other routes; see `serve_guard`.

    Raises:
        ImportError: what the server needs is not installed.
        SettingError: an option that it does not know, or that would have no effect.
        CheckpointError: no such checkpoint, one that cannot be loaded, or an adapter that does not fit.
    """
    # It puts a new module `transformers` instead of the old one when it is imported, so that comes first.
    import transformers.processing_utils  # noqa: F401
    from transformers.cli.serving import server
    from transformers.cli.transformers import app

    import modeling_mistral_large
    from mistral_large_conversion.errors import CheckpointError, MistralLargeError
    from modeling_mistral_large.adapter_loading import load_on_base
    from modeling_mistral_large.configuration_mistral_large import read_any_of_ours, read_for_auto_classes
    from modeling_mistral_large.transformers_api import read_config_dict_with

    from . import serve_guard

    serve_guard.check_options(options)
    model_class = modeling_mistral_large.MistralLargeForCausalLM
    # What the server loads the model with, by the name that config.json says.
    loader: Any = model_class
    tokenizer = None
    if adapter is not None:
        loader = SimpleNamespace(from_pretrained=partial(load_on_base, model_class, adapter=adapter.folder))
        if adapter.tokenizer_place is not None:
            tokenizer = modeling_mistral_large.MistralLargeTokenizer.from_pretrained(
                adapter.given, **adapter.tokenizer_place
            )
    # transformers' own notation.
    wanted = checkpoint if revision is None else f"{checkpoint}@{revision}"
    setattr(sys.modules["transformers"], model_class.__name__, loader)
    build_server = server.build_server

    def build_guarded_server(*arguments: Any, **keywords: Any) -> Any:
        built = build_server(*arguments, **keywords)
        given = inspect.signature(build_server).bind(*arguments, **keywords).arguments
        (loaded,) = given["model_manager"].loaded_models.values()
        serve_guard.guard(
            built,
            chat_handler=given["chat_handler"],
            loaded=loaded,
            tokenizer=tokenizer,
            checkpoint=checkpoint,
            revision=revision,
            name=checkpoint if adapter is None else adapter.name,
            name_inside=wanted,
            host=host,
            allows_all_origins=given.get("enable_cors", False),
        )
        if drafting is not None:
            device = str(loaded.model.device)
            draft = drafting.generate_options(
                loaded.model, loaded.processor, load_model, dtype="auto", device_map=device
            )
            loaded.model.generate = partial(loaded.model.generate, **draft)
        return built

    server.build_server = build_guarded_server
    # This process serves one checkpoint: the class is ours, of a config of type `mistral` of any name, too.
    read_config_dict_with(read_any_of_ours)
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
        setattr(sys.modules["transformers"], model_class.__name__, model_class)
        read_config_dict_with(read_for_auto_classes)
