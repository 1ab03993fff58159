"""Printing of `mistral-large plan`: what fits where, how fast it can be, and how to run it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from modeling_mistral_large import MistralLargeConfig
    from modeling_mistral_large.sharding import Device, DeviceLoad, ShardingPlan

PUBLISHED_NAME = "mistralai/Mistral-Large-Instruct-2407"
# The parts of a bar, and how they look.
PARTS = {"weights": ("█", "blue"), "cache": ("▓", "green"), "activations": ("▒", "yellow"), "reserve": ("░", "magenta")}
BAR_WIDTH = 40
PARALLEL = "torchrun --nproc-per-node {count} --no-python mistral-large chat {model}"
MAPPED = """\
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.sharding import detect_devices, device_map_for

config = MistralLargeConfig.from_pretrained({model!r})
device_map = device_map_for(config, detect_devices(), context={context}, batch={batch}{host})
model = MistralLargeForCausalLM.from_pretrained({model!r}, dtype={dtype!r}, device_map=device_map)
model.generate(..., prefill_chunk_size={chunk})"""


def plan(
    model: str | None,
    gpus: str,
    *,
    context: int,
    batch: int,
    dtype: str,
    chunk: int,
    host: str,
    svg: Path | None,
    as_json: bool,
) -> bool:
    """Print the ways to run a model and return whether one of them fits.

    model: a folder or repository, of which the geometry is read; None is the published model.

    Raises:
        PlanError, CheckpointError: what is asked for makes no sense, or the model has no geometry of ours.
    """
    from rich.console import Console

    from modeling_mistral_large.sharding import Sizes, detect_devices, parse_devices, plan_sharding

    config = read_config(model)
    devices = detect_devices() if gpus == "auto" else parse_devices(gpus)
    host_memory = parse_host(host)
    options: dict[str, Any] = {"batch": batch, "dtype": dtype, "prefill_chunk": chunk, "host_memory": host_memory}
    plans = plan_sharding(config, devices, context=context, **options)
    best = plans[0]
    changes = {} if best.fits else smallest_changes(config, devices, context, options)
    cache = cache_bytes(config, context, batch, dtype)
    weights = Sizes.of(config, dtype).weights
    command = None if not best.fits else how_to_run(best, model or PUBLISHED_NAME, context, options)
    if as_json:
        report = {
            "weights_bytes": weights,
            "cache_bytes": cache,
            "context": context,
            **options,
            "fits": best.fits,
            "ways": [{**asdict(way), "fits": way.fits} for way in plans],
            "run": command,
            "changes": changes,
        }
        print(json.dumps(report, indent=2))
        return best.fits
    console = Console(highlight=False, markup=False, soft_wrap=True, record=svg is not None)
    console.print(
        f"{model or PUBLISHED_NAME}: {gib(weights)} of weights in {dtype}, {gib(cache)} of cache for {batch} × "
        f"{context:,} positions, prompts read {min(chunk, context):,} positions at a time"
    )
    console.print(ways_table(plans))
    for number, load in enumerate(best.loads):
        console.print(bar(number, load))
    if best.host_weights:
        console.print(f"host  {gib(best.host_weights)} of weights, read for every token")
    legend = "  ".join(f"{mark} {part}" for part, (mark, _) in PARTS.items())
    console.print(legend, style="dim")
    if command is not None:
        console.print("\nRun it:\n")
        console.print(command)
    else:
        console.print(f"\nIt does not fit: no room for {gib(best.missing)}. What would fit:")
        for change in changes.values() or ["nothing on such devices; take larger ones"]:
            console.print(f"  {change}")
    if svg is not None:
        svg.write_text(console.export_svg(title="mistral-large plan"), encoding="utf-8")
    return best.fits


def read_config(model: str | None) -> "MistralLargeConfig":
    """Return the geometry of a folder or repository, or the published one."""
    from modeling_mistral_large import MistralLargeConfig
    from modeling_mistral_large.errors import CheckpointError, MistralLargeError

    if model is None:
        return MistralLargeConfig()
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in ("params.json", "config.json")):
        # transformers would take the geometry of another model for it: the default one.
        raise CheckpointError(f"{model}: neither params.json nor config.json; pass a checkpoint, or no name")
    try:
        config: MistralLargeConfig = MistralLargeConfig.from_pretrained(model)
    except MistralLargeError:
        raise
    # transformers raises these for whatever it does not find.
    except (OSError, ValueError) as error:
        finding = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{model}: no geometry to be read ({finding}); pass a checkpoint, or no name") from error
    return config


def parse_host(size: str) -> int:
    """Return the bytes of a size such as 512GB."""
    from modeling_mistral_large.conversion.plan import parse_size

    return 0 if size == "0" else parse_size(size)


def cache_bytes(config: "MistralLargeConfig", context: int, batch: int, dtype: str) -> int:
    from modeling_mistral_large.sharding import Demand, cache_bytes_of_layer

    return config.num_hidden_layers * cache_bytes_of_layer(config, Demand(context, batch, dtype))


def smallest_changes(
    config: "MistralLargeConfig", devices: "Sequence[Device]", context: int, options: dict[str, Any]
) -> dict[str, str]:
    """Return what could be asked for instead, one thing changed at a time, by its name."""
    from modeling_mistral_large.sharding import fewest_devices, largest_context, plan_sharding

    changes = {}
    if length := largest_context(config, devices, **options):
        changes["context"] = f"--context {length}"
    for batch in range(options["batch"] - 1, 0, -1):
        if plan_sharding(config, devices, context=context, **{**options, "batch": batch})[0].fits:
            changes["batch"] = f"--batch {batch}"
            break
    if count := fewest_devices(config, devices[0], context=context, **options):
        changes["gpus"] = f"--gpus {count}x{devices[0].name}"
    unlimited = plan_sharding(config, devices, context=context, **{**options, "host_memory": 2**63})
    offloaded = next((plan for plan in unlimited if plan.fits), None)
    if offloaded is not None:
        rate = offloaded.tokens_per_second
        slow = "" if rate is None else f", at most {rate:.2g} tokens/s"
        changes["host"] = f"--host {-(-offloaded.host_weights // 10**9)}GB{slow}"
    return changes


def how_to_run(plan: "ShardingPlan", model: str, context: int, options: dict[str, Any]) -> str:
    """Return the command or the code that runs a plan."""
    if plan.way == "tensor parallel":
        return PARALLEL.format(count=len(plan.loads), model=model)
    host = f", host_memory={options['host_memory']}" if plan.host_weights else ""
    chunk = min(options["prefill_chunk"], context)
    return MAPPED.format(
        model=model, context=context, batch=options["batch"], dtype=options["dtype"], chunk=chunk, host=host
    )


def ways_table(plans: "Sequence[ShardingPlan]") -> Any:
    from rich.table import Table

    table = Table("way", "devices", "fits", "tokens/s at most", "fullest device", box=None, pad_edge=False)
    for way in plans:
        fullest = min(way.loads, key=lambda load: load.free)
        rate = "?" if way.tokens_per_second is None and way.fits else f"{way.tokens_per_second or 0:.3g}"
        table.add_row(
            way.way,
            str(len(way.loads)),
            "yes" if way.fits else f"no, {gib(way.missing)} too much",
            rate if way.fits else "",
            f"{gib(fullest.total)} of {gib(fullest.device.memory)}",
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
