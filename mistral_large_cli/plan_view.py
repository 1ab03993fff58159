"""How a plan is shown: as a table, as bars of the devices' memory, and as JSON."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mistral_large_conversion.sharding.plan import DeviceLoad, ShardingPlan

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

# The parts of a bar, and how they look.
PARTS = {
    "weights": ("weight_bytes", "█", "blue"),
    "cache": ("cache_bytes", "▓", "green"),
    "activations": ("activation_bytes", "▒", "yellow"),
    "reserve": ("reserve_bytes", "░", "magenta"),
    "draft": ("draft_bytes", "▞", "cyan"),
}
BAR_WIDTH = 40


def strategy_report(plan: ShardingPlan) -> dict[str, Any]:
    """Return a plan as JSON has it: every number of bytes with its unit in the name."""
    return {
        "strategy": plan.strategy,
        "weights": plan.weights,
        "fits": plan.fits,
        "shortfall_bytes": plan.shortfall_bytes,
        "tokens_per_second": plan.tokens_per_second,
        "host_weight_bytes": plan.host_weight_bytes,
        "devices": [
            {
                "name": load.device.name,
                "memory_bytes": load.device.memory_bytes,
                "bandwidth_bytes_per_second": load.device.bandwidth,
                **{name: getattr(load, name) for name, _, _ in parts_of(load).values()},
                "free_bytes": load.free_bytes,
            }
            for load in plan.loads
        ],
        "device_map": plan.device_map,
    }


def strategies_table(plans: Sequence[ShardingPlan]) -> "Table":
    """Return strategies as rows, with the fullest device of each."""
    from rich.table import Table

    table = Table("strategy", "weights", "devices", "fits", "tokens/s", "fullest device", box=None, pad_edge=False)
    for plan in plans:
        fullest = min(plan.loads, key=lambda load: load.free_bytes)
        rate = "?" if plan.tokens_per_second is None and plan.fits else f"{plan.tokens_per_second or 0:.3g}"
        table.add_row(
            plan.strategy,
            plan.weights,
            str(len(plan.loads)),
            "yes" if plan.fits else f"no, by {gib(plan.shortfall_bytes)}",
            rate if plan.fits else "",
            f"{fullest.total_bytes / 2**30:.1f} of {gib(fullest.device.memory_bytes)}",
        )
    return table


def parts_of(load: DeviceLoad) -> dict[str, tuple[str, str, str]]:
    """Return the parts of a device's bar; a draft is one where there is one."""
    return {part: look for part, look in PARTS.items() if part != "draft" or load.draft_bytes}


def bar(number: int, load: DeviceLoad) -> "Text":
    """Return a device as a bar of its parts, as long as its memory."""
    from rich.text import Text

    scale = BAR_WIDTH / max(load.device.memory_bytes, load.total_bytes)
    text = Text(f"{number:<3} {load.device.name:8.8} ")
    end = drawn = 0
    parts = parts_of(load).values()
    for name, mark, colour in parts:
        end += getattr(load, name)
        width = round(end * scale) - drawn
        text.append(mark * width, style=colour)
        drawn += width
    text.append("·" * (BAR_WIDTH - drawn), style="dim")
    sizes = " + ".join(f"{getattr(load, name) / 2**30:.1f}" for name, _, _ in parts)
    return text.append(f" {sizes} = {gib(load.total_bytes)} of {gib(load.device.memory_bytes)}")


def gib(size: int) -> str:
    """Return a number of bytes in GiB."""
    return f"{size / 2**30:,.1f} GiB"
