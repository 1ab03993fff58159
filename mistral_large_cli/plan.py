"""Printing of `mistral-large plan`: what fits where, how fast it can be, and how to run it."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .marks import one_line
from .terminal import console, print_json, write_picture

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.text import Text

    from mistral_large_conversion.checkpoint.geometry import Geometry, ModelSizes
    from mistral_large_conversion.checkpoint.quantization import Quantization
    from mistral_large_conversion.sharding.devices import Device
    from mistral_large_conversion.sharding.plan import DeviceLoad, ShardingPlan

PUBLISHED_NAME = "mistralai/Mistral-Large-Instruct-2407"
# The parts of a bar, and how they look.
PARTS = {"weights": ("█", "blue"), "cache": ("▓", "green"), "activations": ("▒", "yellow"), "reserve": ("░", "magenta")}
BAR_WIDTH = 40
CONVERT = "mistral-large convert {model} {folder} --quantize {weights}"
TALK = "mistral-large chat {model} --device-map cuda{options}"
PARALLEL = "torchrun --nproc-per-node {count} --no-python mistral-large chat {model}{options}"
MAPPED = """\
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from mistral_large_conversion.sharding import detect_devices, device_map_for

config = MistralLargeConfig.from_pretrained({model!r})
device_map = device_map_for(config, detect_devices(), {demand})
model = MistralLargeForCausalLM.from_pretrained({model!r}, dtype={dtype!r}, device_map=device_map)
model.generate(...{options})"""
# For quantized weights, activations.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16", "int4": "bfloat16"}


def plan(
    model: str | None,
    gpus: str,
    *,
    context: int,
    batch: int,
    weights: str | None,
    kv: str,
    chunk: int,
    host: str,
    svg: Path | None,
    as_json: bool,
) -> bool:
    """Print the ways to run a model and return whether one of them fits.

    model: a folder or repository, of which the geometry is read; None is the published model.
    weights: None for those that the folder has, bf16 where they are not quantized.

    Raises:
        PlanError, CheckpointError: what is asked for makes no sense, or the model has no geometry of ours.
    """
    from mistral_large_conversion.errors import PlanError
    from mistral_large_conversion.sharding.devices import detect_devices, parse_devices
    from mistral_large_conversion.sharding.memory import QUANTIZED, Demand, Sizes, cache_bytes_of_layer
    from mistral_large_conversion.sharding.plan import plan_sharding

    if svg is not None and as_json:
        raise PlanError("--svg with --json: the picture is of what is printed, and JSON is not; leave one out")
    geometry, found = read_model_geometry(model)
    if found is not None and weights not in (None, found.scheme):
        raise PlanError(f"{model} has {found.scheme} weights, not {weights}; leave --weights out")
    weights = weights or (found.scheme if found else "bf16")
    devices = detect_devices() if gpus == "auto" else parse_devices(gpus)
    host_memory = parse_host(host)
    if host_memory and weights in QUANTIZED:
        raise PlanError(f"--host with {weights} weights: quantized weights are not offloaded; leave --host out")
    options: dict[str, Any] = {
        "batch": batch,
        "weights": weights,
        "kv": kv,
        "prefill_chunk": chunk,
        "host_memory": host_memory,
    }
    plans = plan_sharding(geometry, devices, context=context, **options)
    best = plans[0]
    smaller = QUANTIZED if weights not in QUANTIZED else ()
    # What could be asked for instead is shown beside it.
    of_others = {**options, "host_memory": 0}
    others = [
        plan_sharding(geometry, devices, context=context, **{**of_others, "weights": each})[0] for each in smaller
    ]
    plans += [plan for plan in others if plan.fits]
    changes = {} if best.fits else smallest_changes(geometry, devices, context, options)
    cache = geometry.num_hidden_layers * cache_bytes_of_layer(geometry, Demand(context, batch, weights, kv))
    weight_bytes = Sizes.of(geometry, weights).weights
    command = None
    if best.fits:
        command = how_to_run(best, model or PUBLISHED_NAME, context, options, is_converted=found is not None)
    if as_json:
        report = {
            "weights_bytes": weight_bytes,
            "cache_bytes": cache,
            "context": context,
            **options,
            "fits": best.fits,
            "ways": [{**asdict(way), "fits": way.fits} for way in plans],
            "run": command,
            "changes": changes,
        }
        print_json(report)
        return best.fits
    out = console(soft_wrap=True, record=svg is not None)
    out.print(
        f"{one_line(model or PUBLISHED_NAME)}: {gib(weight_bytes)} of weights in {weights}, {gib(cache)} of cache for "
        f"{batch} × {context:,} positions, prompts read {min(chunk, context):,} positions at a time"
    )
    out.print(ways_table(plans))
    for number, load in enumerate(best.loads):
        out.print(bar(number, load))
    if best.host_weights:
        out.print(f"host  {gib(best.host_weights)} of weights, read for every token")
    legend = "  ".join(f"{mark} {part}" for part, (mark, _) in PARTS.items())
    out.print(f"{legend}  tokens/s: at most", style="dim")
    if command is not None:
        out.print("\nRun it:\n")
        out.print(command)
    else:
        out.print(f"\nIt does not fit: no room for {gib(best.missing)}. What would fit:")
        for change in changes.values() or ["nothing on such devices; take larger ones"]:
            out.print(f"  {change}")
    if svg is not None:
        write_picture(svg, out.export_svg(title="mistral-large plan"))
    return best.fits


def read_model_geometry(model: str | None) -> "tuple[Geometry, Quantization | None]":
    """Return the geometry and quantization of a folder or repository, or those of the published one.

    Raises:
        CheckpointError: no geometry of ours there.
    """
    from mistral_large_conversion.checkpoint.geometry import PUBLISHED
    from mistral_large_conversion.checkpoint.hub import resolve_source
    from mistral_large_conversion.checkpoint.layout import CONFIG_NAMES, layouts_of
    from mistral_large_conversion.checkpoint.read import read_geometry
    from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME

    if model is None:
        return PUBLISHED, None
    folder = resolve_source(model, patterns=(*CONFIG_NAMES.values(), ADAPTER_CONFIG_NAME))
    return read_geometry(folder, next(iter(layouts_of(folder)), "hf"))


def parse_host(size: str) -> int:
    """Return the bytes of a size such as 512GB."""
    from mistral_large_conversion.options import parse_size

    return 0 if size == "0" else parse_size(size, "host memory")


def smallest_changes(
    geometry: "ModelSizes", devices: "Sequence[Device]", context: int, options: dict[str, Any]
) -> dict[str, str]:
    """Return what could be asked for instead, one thing changed at a time, by its name."""
    from mistral_large_conversion.sharding.memory import QUANTIZED
    from mistral_large_conversion.sharding.plan import (
        LARGEST,
        fewest_devices,
        largest_batch,
        largest_context,
        plan_sharding,
    )

    changes = {}

    def add_first_that_fits(name: str, values: "Iterable[Any]") -> None:
        for value in values:
            # Quantized weights are not offloaded.
            changed = {**options, name: value, "host_memory": 0 if name == "weights" else options["host_memory"]}
            if plan_sharding(geometry, devices, context=context, **changed)[0].fits:
                changes[name] = f"--{name.replace('_', '-')} {value}"
                return

    add_first_that_fits("kv", ["fp8"])
    add_first_that_fits("weights", QUANTIZED if options["weights"] not in QUANTIZED else [])
    if length := largest_context(geometry, devices, **options):
        changes["context"] = f"--context {length}"
    if batch := largest_batch(geometry, devices, context=context, **options):
        changes["batch"] = f"--batch {batch}"
    add_first_that_fits("prefill_chunk", [chunk for chunk in (1024, 512, 256) if chunk < options["prefill_chunk"]])
    if count := fewest_devices(geometry, devices[0], context=context, **options):
        changes["gpus"] = f"--gpus {count}x{devices[0].name}"
    unlimited = []
    if options["weights"] not in QUANTIZED:
        unlimited = plan_sharding(geometry, devices, context=context, **{**options, "host_memory": LARGEST})
    offloaded = next((plan for plan in unlimited if plan.fits), None)
    if offloaded is not None:
        rate = offloaded.tokens_per_second
        slow = "" if rate is None else f", at most {rate:.2g} tokens/s"
        changes["host"] = f"--host {-(-offloaded.host_weights // 10**9)}GB{slow}"
    return changes


def how_to_run(plan: "ShardingPlan", model: str, context: int, options: dict[str, Any], *, is_converted: bool) -> str:
    """Return the commands or the code that run a plan; `is_converted` if the model has its quantized weights."""
    from mistral_large_conversion.sharding.memory import PREFILL_CHUNK, QUANTIZED

    steps = []
    if plan.weights in QUANTIZED and not is_converted:
        folder = f"{Path(model).name}-{plan.weights}"
        steps.append(CONVERT.format(model=shlex.quote(model), folder=shlex.quote(folder), weights=plan.weights))
        model = folder
    kv = " --kv fp8" if options["kv"] == "fp8" else ""
    chunk = options["prefill_chunk"]
    chat_options = kv + (f" --prefill-chunk {chunk}" if chunk != PREFILL_CHUNK else "")
    if plan.way == "tensor parallel":
        steps.append(PARALLEL.format(count=len(plan.loads), model=shlex.quote(model), options=chat_options))
    elif plan.way == "one device":
        steps.append(TALK.format(model=shlex.quote(model), options=chat_options))
    else:
        wanted = {name: options[name] for name in ("weights", "kv", "prefill_chunk", "host_memory")}
        usual = {"weights": "bf16", "kv": "auto", "prefill_chunk": PREFILL_CHUNK, "host_memory": 0}
        demand = {"context": context, "batch": options["batch"]}
        demand |= {name: value for name, value in wanted.items() if value != usual[name]}
        generate = ""
        if kv:
            generate += ", past_key_values=Fp8Cache(config)"
        if chunk != PREFILL_CHUNK:
            generate += f", prefill_chunk_size={chunk}"
        code = MAPPED.format(
            model=model,
            demand=", ".join(f"{name}={value!r}" for name, value in demand.items()),
            dtype=DTYPES[plan.weights],
            options=generate,
        )
        if kv:
            code = f"from modeling_mistral_large.kv_cache import Fp8Cache\n{code}"
        steps.append(code)
    return "\n\n".join(steps)


def ways_table(plans: "Sequence[ShardingPlan]") -> Any:
    from rich.table import Table

    table = Table("way", "weights", "devices", "fits", "tokens/s", "fullest device", box=None, pad_edge=False)
    for way in plans:
        fullest = min(way.loads, key=lambda load: load.free)
        rate = "?" if way.tokens_per_second is None and way.fits else f"{way.tokens_per_second or 0:.3g}"
        table.add_row(
            way.way,
            way.weights,
            str(len(way.loads)),
            "yes" if way.fits else f"no, by {gib(way.missing)}",
            rate if way.fits else "",
            f"{fullest.total / 2**30:.1f} of {gib(fullest.device.memory)}",
        )
    return table


def bar(number: int, load: "DeviceLoad") -> "Text":
    """Return a device as a bar of its parts, as long as its memory."""
    from rich.text import Text

    scale = BAR_WIDTH / max(load.device.memory, load.total)
    text = Text(f"{number:<3} {load.device.name:8.8} ")
    end = drawn = 0
    for part, (mark, colour) in PARTS.items():
        end += getattr(load, part)
        width = round(end * scale) - drawn
        text.append(mark * width, style=colour)
        drawn += width
    text.append("·" * (BAR_WIDTH - drawn), style="dim")
    sizes = " + ".join(f"{getattr(load, part) / 2**30:.1f}" for part in PARTS)
    return text.append(f" {sizes} = {gib(load.total)} of {gib(load.device.memory)}")


def gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
