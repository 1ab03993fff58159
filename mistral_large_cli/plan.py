"""`mistral-large plan`: what fits where, how fast it can be, and how to run it."""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mistral_large_conversion.checkpoint.geometry import PUBLISHED, PUBLISHED_7B, Geometry, ModelSizes
from mistral_large_conversion.checkpoint.hub import resolve_source
from mistral_large_conversion.checkpoint.layout import CONFIG_NAMES, layouts_of
from mistral_large_conversion.checkpoint.quantization import Quantization
from mistral_large_conversion.checkpoint.read import read_geometry
from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME
from mistral_large_conversion.errors import PlanError
from mistral_large_conversion.options import parse_size
from mistral_large_conversion.sharding.devices import Device, detect_devices, parse_devices
from mistral_large_conversion.sharding.memory import QUANTIZED, Draft, Sizes, Workload, cache_bytes_of_layer
from mistral_large_conversion.sharding.plan import (
    LARGEST,
    ShardingPlan,
    fewest_devices,
    largest_batch,
    largest_context,
    plan_sharding,
)

from .options import DTYPES, TORCH_DTYPES, AsJson, CacheDir, Dtype, Kv, PrefillChunk, Revision, Token, hub_options
from .plan_view import bar, gib, parts_of, strategies_table, strategy_report
from .terminal import console, one_line, print_json

PUBLISHED_NAME = "mistralai/Mistral-Large-Instruct-2407"
CONVERT = "mistral-large convert {model} {folder} --quantize {weights}"
CHAT = "mistral-large chat {model} --device-map {device}{chat_options}"
PARALLEL = "torchrun --nproc-per-node {count} --no-python mistral-large chat {model}{chat_options}"
MAPPED = """\
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from mistral_large_conversion.sharding import {names}

config = MistralLargeConfig.from_pretrained({model!r})
device_map = device_map_for(config, detect_devices(), {plan_options})
model = MistralLargeForCausalLM.from_pretrained({model!r}, dtype={dtype!r}, device_map=device_map)
{draft}model.generate(...{generate_options})"""
MAPPED_DRAFT = "draft = MistralLargeForCausalLM.from_pretrained({draft!r}, dtype='auto', device_map=0)\n"
SIZES_OF_DRAFT = ", draft=Draft(MistralLargeConfig.from_pretrained({draft!r}), {weights!r})"
# What --draft takes for Mistral-7B-Instruct-v0.3 in bf16, which need not be here.
NAME_OF_7B, REPOSITORY_OF_7B = "7B", "mistralai/Mistral-7B-Instruct-v0.3"


@dataclass(frozen=True)
class PlanOptions:
    """What is to be run, under the names of `plan_sharding`, which see."""

    context: int
    batch: int = 1
    weights: str = "bf16"
    kv: str = "auto"
    prefill_chunk: int = 2048
    host_memory: int = 0
    draft: Draft | None = None

    def plans(self, geometry: ModelSizes, devices: Sequence[Device]) -> list[ShardingPlan]:
        """Return the strategies for it, the best first."""
        return plan_sharding(geometry, devices, **self.keywords())

    def keywords(self, *left_out: str) -> dict[str, Any]:
        """Return it as keyword arguments, without those that are `left_out`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in left_out}


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Folder or repository on the hub; without it, Mistral-Large-Instruct-2407."),
    ] = None,
    gpus: Annotated[
        str,
        typer.Option(
            help="8xA100-80GB, H200, 4x4090, 2xA100+1x24GB, 4x95GiB@3.9 (TB/s), cpu, mac-192GB; auto: those here."
        ),
    ] = "auto",
    context: Annotated[int, typer.Option(min=1, help="Context length: tokens of prompt and completion.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Batch size.")] = 1,
    weights: Annotated[
        Literal[Dtype, "fp8", "int4", "nvfp4"] | None,
        typer.Option(
            help="Dtype of the weights; default: the folder's, or bf16. fp8, int4, nvfp4: as convert --quantize "
            "writes them."
        ),
    ] = None,
    kv: Kv = "auto",
    prefill_chunk: PrefillChunk = 2048,
    host: Annotated[str, typer.Option(help="Host memory for offloaded weights, as 512GB; 0: no offloading.")] = "0",
    draft: Annotated[
        str | None,
        typer.Option(help="Model that drafts tokens: folder or repository; 7B: Mistral-7B-Instruct-v0.3 in bf16."),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Plan how a model fits on GPUs, how fast it can be and how to run it; exit code 1 if it does not fit."""
    hub = hub_options(model, revision, token, cache_dir, draft=None if draft == NAME_OF_7B else draft)

    geometry, found = read_model_geometry(model, hub)
    dtype: str | None = None if weights is None else DTYPES.get(weights, weights)
    if found is not None and dtype not in (None, found.scheme):
        raise PlanError(f"{model} has {found.scheme} weights, not {weights}; leave --weights out")
    dtype = dtype or (found.scheme if found else "bf16")
    devices = detect_devices() if gpus == "auto" else parse_devices(gpus)
    host_memory = 0 if host == "0" else parse_size(host, "host memory")
    if host_memory and dtype in QUANTIZED:
        raise PlanError(f"--host with {dtype} weights: quantized weights are not offloaded; leave --host out")
    if host_memory and devices[0].kind != "cuda":
        raise PlanError(f"--host with {devices[0].name}: its memory is the host's; leave --host out")
    fp8 = next((each for each in (dtype, kv) if each in ("fp8", "nvfp4")), None)
    if devices[0].kind == "mps" and fp8:
        raise PlanError(
            f"{fp8} on {devices[0].name}: torch has no FP8 on Apple GPUs; take --weights int4 and --kv auto"
        )
    drafting = None if draft is None else read_draft(draft, {**hub, "revision": None})
    options = PlanOptions(context, batch, dtype, kv, prefill_chunk, host_memory, drafting)
    plans = options.plans(geometry, devices)
    best = plans[0]
    # What could be asked for instead is listed, too.
    smaller = quantized_on(devices) if dtype not in QUANTIZED else ()
    others = [replace(options, weights=each, host_memory=0).plans(geometry, devices)[0] for each in smaller]
    plans += [plan for plan in others if plan.fits]
    changes = {} if best.fits else smallest_changes(geometry, devices, options)
    cache_bytes = geometry.num_hidden_layers * cache_bytes_of_layer(geometry, Workload(context, batch, dtype, kv))
    weight_bytes = Sizes.of(geometry, dtype).weights
    command = None
    if best.fits:
        named = REPOSITORY_OF_7B if draft == NAME_OF_7B else draft
        command = how_to_run(best, model or PUBLISHED_NAME, options, is_converted=found is not None, draft=named)
    assumptions = [assumption for assumption in dict.fromkeys(device.assumption for device in devices) if assumption]
    if as_json:
        print_json(
            {
                "weight_bytes": weight_bytes,
                "cache_bytes": cache_bytes,
                **options.keywords("host_memory", "draft"),
                **draft_report(draft, options),
                "host_memory_bytes": host_memory,
                "fits": best.fits,
                "strategies": [strategy_report(plan) for plan in plans],
                "assumptions": assumptions,
                "run": command,
                "changes": changes,
            }
        )
        raise typer.Exit(not best.fits)
    out = console(soft_wrap=True)
    out.print(
        f"{one_line(model or PUBLISHED_NAME)}: {gib(weight_bytes)} of weights in {dtype}, {gib(cache_bytes)} of cache "
        f"for {batch} × {context:,} tokens, prefill chunks of {min(prefill_chunk, context):,} tokens"
    )
    for name, size in draft_report(draft, options).items():
        out.print(
            f"{one_line(name)}: {one_line(draft or '')}, {gib(size['weight_bytes'])} of weights in {size['weights']}, "
            f"{gib(size['cache_bytes'])} of cache; rates are those without it"
        )
    for assumption in assumptions:
        out.print(f"assumed: {assumption}", style="dim")
    out.print(strategies_table(plans))
    for number, load in enumerate(best.loads):
        out.print(bar(number, load))
    if best.host_weight_bytes:
        out.print(f"host  {gib(best.host_weight_bytes)} of weights, read for every token")
    legend = "  ".join(f"{mark} {part}" for part, (_, mark, _) in parts_of(best.loads[0]).items())
    out.print(f"{legend}  tokens/s: at most", style="dim")
    if command is not None:
        out.print("\nRun it:\n")
        out.print(command)
    else:
        out.print(f"\nIt does not fit: {gib(best.shortfall_bytes)} short. What would fit:")
        for change in changes.values() or ["nothing on such devices; take larger ones"]:
            out.print(f"  {change}")
    raise typer.Exit(not best.fits)


def read_model_geometry(model: str | None, hub: dict[str, Any]) -> tuple[Geometry, Quantization | None]:
    """Return the geometry and quantization of a folder or repository, or those of the published one.

    Raises:
        CheckpointError: no geometry of ours there.
    """

    if model is None:
        return PUBLISHED, None
    folder = resolve_source(model, patterns=(*CONFIG_NAMES.values(), ADAPTER_CONFIG_NAME), **hub)
    return read_geometry(folder, next(iter(layouts_of(folder)), "hf"))


def read_draft(draft: str, hub: dict[str, Any]) -> Draft:
    """Return the sizes of a folder or repository that is to draft tokens, or those of the published 7B.

    Raises:
        CheckpointError: no geometry of ours there.
    """

    if draft == NAME_OF_7B:
        return Draft(PUBLISHED_7B)
    geometry, found = read_model_geometry(draft, {} if Path(draft).exists() else hub)
    return Draft(geometry, found.scheme if found else "bf16")


def draft_report(name: str | None, options: PlanOptions) -> dict[str, Any]:
    """Return the draft as JSON has it, empty without one."""
    if options.draft is None:
        return {}
    workload = Workload(options.context, options.batch, options.weights, options.kv, options.prefill_chunk)
    return {
        "draft": {
            "model": name,
            "weights": options.draft.weights,
            "weight_bytes": options.draft.weight_bytes(),
            "cache_bytes": options.draft.cache_bytes(workload),
        }
    }


def quantized_on(devices: Sequence[Device]) -> tuple[str, ...]:
    """Return the quantized weights that run on these devices."""
    return ("int4",) if devices[0].kind == "mps" else ("fp8", "int4")


def smallest_changes(geometry: ModelSizes, devices: Sequence[Device], options: PlanOptions) -> dict[str, str]:
    """Return what could be asked for instead, one thing changed at a time, by its name."""

    changes = {}

    def add_first_that_fits(name: str, values: Iterable[Any]) -> None:
        for value in values:
            # Quantized weights are not offloaded.
            host_memory = 0 if name == "weights" else options.host_memory
            changed = replace(options, **{"host_memory": host_memory, name: value})
            if changed.plans(geometry, devices)[0].fits:
                changes[name] = f"--{name.replace('_', '-')} {value}"
                return

    add_first_that_fits("kv", ["fp8"] if "fp8" in quantized_on(devices) else [])
    add_first_that_fits("weights", quantized_on(devices) if options.weights not in QUANTIZED else [])
    if length := largest_context(geometry, devices, **options.keywords("context")):
        changes["context"] = f"--context {length}"
    if batch := largest_batch(geometry, devices, **options.keywords()):
        changes["batch"] = f"--batch {batch}"
    add_first_that_fits("prefill_chunk", [chunk for chunk in (1024, 512, 256) if chunk < options.prefill_chunk])
    if devices[0].kind != "cuda":
        # One of these is all that a machine has.
        return changes
    if count := fewest_devices(geometry, devices[0], **options.keywords()):
        changes["gpus"] = f"--gpus {shlex.quote(f'{count}x{devices[0].name}')}"
    unlimited = []
    if options.weights not in QUANTIZED:
        unlimited = replace(options, host_memory=LARGEST).plans(geometry, devices)
    offloaded = next((plan for plan in unlimited if plan.fits), None)
    if offloaded is not None:
        rate = offloaded.tokens_per_second
        slow = "" if rate is None else f", at most {rate:.2g} tokens/s"
        changes["host"] = f"--host {-(-offloaded.host_weight_bytes // 10**9)}GB{slow}"
    return changes


def how_to_run(
    plan: ShardingPlan, model: str, options: PlanOptions, *, is_converted: bool, draft: str | None = None
) -> str:
    """Return the commands or the code that run a plan; `is_converted` if the model has its quantized weights."""
    steps = []
    if plan.weights in QUANTIZED and not is_converted:
        folder = f"{Path(model).name}-{plan.weights}"
        steps.append(CONVERT.format(model=shlex.quote(model), folder=shlex.quote(folder), weights=plan.weights))
        model = folder
    usual = PlanOptions(options.context)
    kv = " --kv fp8" if options.kv == "fp8" else ""
    chunk = f" --prefill-chunk {options.prefill_chunk}" if options.prefill_chunk != usual.prefill_chunk else ""
    chat_options = kv + chunk + ("" if draft is None else f" --draft {shlex.quote(draft)}")
    if plan.strategy == "tensor parallel":
        steps.append(PARALLEL.format(count=len(plan.loads), model=shlex.quote(model), chat_options=chat_options))
    elif plan.strategy == "one device":
        device = plan.loads[0].device.kind
        steps.append(CHAT.format(model=shlex.quote(model), device=device, chat_options=chat_options))
    else:
        wanted = {
            name: value
            for name, value in options.keywords("draft").items()
            if name in ("context", "batch") or value != getattr(usual, name)
        }
        generate = ", past_key_values=Fp8Cache(config)" if kv else ""
        generate += f", prefill_chunk_size={options.prefill_chunk}" if chunk else ""
        generate += "" if draft is None else ", assistant_model=draft"
        sizes = "" if options.draft is None else SIZES_OF_DRAFT.format(draft=draft, weights=options.draft.weights)
        code = MAPPED.format(
            model=model,
            names="detect_devices, device_map_for" if draft is None else "Draft, detect_devices, device_map_for",
            plan_options=", ".join(f"{name}={value!r}" for name, value in wanted.items()) + sizes,
            # Of quantized weights, the activations'.
            dtype=TORCH_DTYPES.get(plan.weights, "bfloat16"),
            draft="" if draft is None else MAPPED_DRAFT.format(draft=draft),
            generate_options=generate,
        )
        if kv:
            code = f"from modeling_mistral_large.inference.kv_cache import Fp8Cache\n{code}"
        steps.append(code)
    return "\n\n".join(steps)
