"""Where a model runs: what each device has to hold, decided from the geometry before a weight is read.

`plan_sharding` is a pure function of sizes. Sizes are bytes, rates are bytes a second.
"""

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from mistral_large_conversion.checkpoint.geometry import ModelSizes
from mistral_large_conversion.checkpoint.source_files import shown
from mistral_large_conversion.errors import PlanError
from mistral_large_conversion.notebook import html_table
from mistral_large_conversion.sharding.devices import Device
from mistral_large_conversion.sharding.memory import (
    BYTES_OF_NUMBER,
    CACHES,
    GIB,
    PREFILL_CHUNK,
    QUANTIZED,
    Draft,
    Sizes,
    Workload,
    activation_bytes,
    cache_bytes_of_layer,
)

# Of the bandwidth on the sheet, kernels reach about so much.
REACHED_BANDWIDTH = 0.9
# Weights that lie in the host's memory cross the bus for every token: PCIe 4 × 16, as measured on most hosts.
HOST_BANDWIDTH = 25e9
# Of bytes and counts: more than any machine has, and few enough to be computed with.
LARGEST = 2**62
# What the driver, the libraries and the allocator's gaps take of each device.
RESERVE = 2 * GIB


Strategy = Literal["one device", "device_map", "tensor parallel", "device_map with offload"]


@dataclass(frozen=True)
class DeviceLoad:
    """What one device holds, in bytes; `modules` are the names that a device_map has for it.

    draft_bytes: weights and cache of a draft.
    """

    device: Device
    modules: tuple[str, ...]
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    reserve_bytes: int = RESERVE
    draft_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes + self.reserve_bytes + self.draft_bytes

    @property
    def free_bytes(self) -> int:
        """Negative where it does not fit."""
        return self.device.memory_bytes - self.total_bytes


@dataclass(frozen=True)
class ShardingPlan:
    """One strategy to run the model.

    weights: as in `Workload`.
    device_map: what `from_pretrained` takes, or None for tensor parallelism.
    host_weight_bytes: bytes of weights in the host's memory.
    shortfall_bytes: bytes for which there is no room, 0 where the model fits.
    tokens_per_second: of all sequences together, the most that the devices' bandwidth allows at the end of the context;
        None where that is not known.
    """

    strategy: Strategy
    weights: str
    loads: tuple[DeviceLoad, ...]
    device_map: dict[str, int | str] | None
    host_weight_bytes: int
    shortfall_bytes: int
    tokens_per_second: float | None

    @property
    def fits(self) -> bool:
        return self.shortfall_bytes == 0

    def _repr_html_(self) -> str:
        speed = "" if self.tokens_per_second is None else f", at most {self.tokens_per_second:.3g} tokens/s"
        fit = "fits" if self.fits else f"{self.shortfall_bytes / GIB:.1f} GiB short"
        head = (f"{self.strategy}, {self.weights}: {fit}{speed}", "weights", "cache", "activations", "total", "GiB")
        rows = [
            (
                load.device.name,
                *(
                    f"{size / GIB:.1f}"
                    for size in (load.weight_bytes, load.cache_bytes, load.activation_bytes, load.total_bytes)
                ),
                f"of {load.device.memory_bytes / GIB:.1f}",
            )
            for load in self.loads
        ]
        return html_table(rows, head=head)


def plan_sharding(
    config: ModelSizes,
    devices: Sequence[Device],
    *,
    context: int,
    batch: int = 1,
    weights: str = "bf16",
    kv: str = "auto",
    prefill_chunk: int = PREFILL_CHUNK,
    host_memory: int = 0,
    draft: Draft | None = None,
) -> list[ShardingPlan]:
    """Return every strategy to run the model on these devices, the best first: those that fit, then the fastest.

    context: tokens of prompt and response together; batch: number of sequences.
    weights, kv: as in `Workload`.
    prefill_chunk: tokens of a prefill chunk, the `prefill_chunk_size` of `generate`.
    host_memory: bytes of the host that weights may lie in; 0 offloads nothing. Quantized ones are not offloaded.
    draft: lies on the first device or, with tensor parallelism, sharded as the model is; rates are those without it.

    Raises:
        PlanError: no devices, or a number that makes no sense.
    """
    workload = Workload(context, batch, weights, kv, prefill_chunk)
    _check(config, devices, workload, host_memory)
    if draft is not None:
        _check_draft(config, workload, draft)
    plans = [_plan_device_map(config, devices, workload, draft=draft)]
    if _can_be_parallel(config, devices) and (draft is None or _can_be_parallel(draft.sizes, devices)):
        plans.append(_plan_tensor_parallel(config, devices, workload, draft))
    if host_memory and not plans[0].fits and weights not in QUANTIZED:
        plans.append(_plan_offload(config, devices, workload, host_memory, draft))
    return sorted(plans, key=lambda plan: (plan.shortfall_bytes, -(plan.tokens_per_second or 0)))


def device_map_for(config: ModelSizes, devices: Sequence[Device], **options: Any) -> dict[str, int | str]:
    """Return the `device_map` of the fastest plan that has one; `options` are those of `plan_sharding`.

    Raises:
        PlanError: the model does not fit, and by how much.
    """
    plans = [plan for plan in plan_sharding(config, devices, **options) if plan.strategy != "tensor parallel"]
    if plans[0].device_map is None:
        raise PlanError(
            f"no room for {plans[0].shortfall_bytes / GIB:,.1f} GiB on these {len(devices)} devices; take more of "
            "them, a shorter context or a smaller batch, or let weights lie in the host's memory (host_memory)"
        )
    return plans[0].device_map


def _check(config: ModelSizes, devices: Sequence[Device], workload: Workload, host_memory: int) -> None:
    if not devices:
        raise PlanError("no devices: a plan needs at least one; name them as in 8x80GB")
    if workload.weights not in BYTES_OF_NUMBER:
        raise PlanError(f"weights {shown(workload.weights)}: must be one of {', '.join(BYTES_OF_NUMBER)}")
    if workload.kv not in CACHES:
        raise PlanError(f"kv {shown(workload.kv)}: must be one of {', '.join(CACHES)}")
    if not _is_whole(workload.context, 1, config.max_position_embeddings):
        raise PlanError(
            f"context {shown(workload.context)}: must be 1 to {config.max_position_embeddings} tokens, the context "
            "length of the model"
        )
    for name, value in {"batch": workload.batch, "prefill_chunk": workload.prefill_chunk}.items():
        if not _is_whole(value, 1, LARGEST):
            raise PlanError(f"{name} {shown(value)}: must be at least 1, and at most {LARGEST}")
    if not _is_whole(host_memory, 0, LARGEST):
        raise PlanError(f"host_memory {shown(host_memory)}: must be 0 or more bytes, and at most {LARGEST}")
    if host_memory and workload.weights in QUANTIZED:
        raise PlanError(
            f"host_memory with {workload.weights} weights: quantized weights are not offloaded; leave it out"
        )


def _check_draft(config: ModelSizes, workload: Workload, draft: Draft) -> None:
    if draft.weights not in BYTES_OF_NUMBER:
        raise PlanError(f"draft's weights {shown(draft.weights)}: must be one of {', '.join(BYTES_OF_NUMBER)}")
    if draft.sizes.vocab_size != config.vocab_size:
        raise PlanError(
            f"the draft has {draft.sizes.vocab_size} tokens, and the model {config.vocab_size}: a draft must have the "
            "vocabulary of the model; take another draft"
        )
    if workload.batch > 1:
        raise PlanError(f"batch {workload.batch} with a draft: drafts are of one sequence; leave one of the two out")


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _plan_device_map(
    config: ModelSizes,
    devices: Sequence[Device],
    workload: Workload,
    *,
    offloaded: int = 0,
    draft: Draft | None = None,
) -> ShardingPlan:
    """Whole layers, one device after the other, as evenly as the limits allow; the last `offloaded` ones on the host.

    Offloaded layers run on the first device, which holds their cache, and the weights of one at a time.
    """
    sizes, cache = Sizes.of(config, workload.weights), cache_bytes_of_layer(config, workload)
    activations = activation_bytes(config, workload)
    drafting = 0 if draft is None else draft.total_bytes(workload)
    per_layer = sizes.layer + cache
    used = list(range(len(devices)))
    while True:
        # Every device's own, without layers: a device that has no room for that is left out.
        first, last = used[0], used[-1]
        fixed = dict.fromkeys(used, RESERVE + activations)
        fixed[first] += drafting + sizes.embedding + (offloaded * cache + sizes.layer if offloaded else 0)
        fixed[last] += sizes.norm + sizes.head
        crowded = [index for index in used if fixed[index] > devices[index].memory_bytes]
        if not crowded or len(used) == 1:
            break
        used.remove(crowded[0])
    counts = dict.fromkeys(used, 0)
    to_place = sizes.layers - offloaded
    # Each layer goes to the emptiest device that has room for it, the first of them.
    emptiest = [(fixed[index], index) for index in used]
    heapq.heapify(emptiest)
    while to_place and emptiest:
        held, index = heapq.heappop(emptiest)
        if held + per_layer <= devices[index].memory_bytes:
            heapq.heappush(emptiest, (held + per_layer, index))
            counts[index] += 1
            to_place -= 1
    missing = to_place * per_layer + sum(max(0, fixed[index] - devices[index].memory_bytes) for index in used)

    layers = iter(range(sizes.layers))
    modules = {index: [f"model.layers.{next(layers)}" for _ in range(counts[index])] for index in used}
    modules[first] = ["model.embed_tokens", "model.rotary_emb", *modules[first]]
    modules[last] = [*modules[last], "model.norm", "lm_head"]
    host_modules = [f"model.layers.{layer}" for layer in layers] if offloaded else []
    loads = [
        DeviceLoad(
            device=devices[index],
            modules=tuple(modules[index]),
            weight_bytes=counts[index] * sizes.layer
            + (sizes.embedding if index == first else 0)
            + (sizes.norm + sizes.head if index == last else 0),
            cache_bytes=counts[index] * cache + (offloaded * cache if index == first else 0),
            activation_bytes=activations + (sizes.layer if offloaded and index == first else 0),
            draft_bytes=drafting if index == first else 0,
        )
        for index in used
        if modules[index]
    ]
    seconds = [_read_seconds(load, sizes.embedding if load is loads[0] else 0) for load in loads]
    seconds.append(offloaded * sizes.layer / HOST_BANDWIDTH)
    device_map: dict[str, int | str] = {module: index for index in used for module in modules[index]}
    device_map |= dict.fromkeys(host_modules, "cpu")
    return ShardingPlan(
        strategy="device_map with offload" if offloaded else "one device" if len(loads) == 1 else "device_map",
        weights=workload.weights,
        loads=tuple(loads),
        device_map=None if missing else device_map,
        host_weight_bytes=offloaded * sizes.layer,
        shortfall_bytes=missing,
        tokens_per_second=None if missing else _rate(workload, sum(seconds)),
    )


def _can_be_parallel(config: ModelSizes, devices: Sequence[Device]) -> bool:
    """Whether each device can take an equal shard of every layer: transformers cuts no key-value head."""
    ranks = len(devices)
    shared = (config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    return ranks > 1 and not any(size % ranks for size in shared)


def _plan_tensor_parallel(
    config: ModelSizes, devices: Sequence[Device], workload: Workload, draft: Draft | None = None
) -> ShardingPlan:
    """An equal shard of every layer and of the head on every device; embedding and norms whole."""
    ranks = len(devices)
    sizes = Sizes.of(config, workload.weights, ranks=ranks)
    loads = [
        DeviceLoad(
            device=device,
            modules=(),
            weight_bytes=sizes.weights,
            cache_bytes=sizes.layers * cache_bytes_of_layer(config, workload) // ranks,
            activation_bytes=activation_bytes(config, workload, ranks=ranks),
            draft_bytes=0 if draft is None else draft.total_bytes(workload, ranks=ranks),
        )
        for device in devices
    ]
    missing = sum(max(0, -load.free_bytes) for load in loads)
    # The slowest rank counts; where one is not known, all of it is not.
    seconds = [_read_seconds(load, sizes.embedding) for load in loads]
    slowest = math.nan if any(map(math.isnan, seconds)) else max(seconds)
    return ShardingPlan(
        strategy="tensor parallel",
        weights=workload.weights,
        loads=tuple(loads),
        device_map=None,
        host_weight_bytes=0,
        shortfall_bytes=missing,
        tokens_per_second=None if missing else _rate(workload, slowest),
    )


def _plan_offload(
    config: ModelSizes,
    devices: Sequence[Device],
    workload: Workload,
    host_memory: int,
    draft: Draft | None = None,
) -> ShardingPlan:
    """As many layers on the devices as they hold, the others on the host."""
    layers = config.num_hidden_layers
    plan = _plan_device_map(config, devices, workload, offloaded=layers, draft=draft)
    if plan.fits:
        # Where all can be offloaded, one more always can: the first device has room for the cache of all.
        fewest = 1 + bisect_left(
            range(1, layers),
            True,
            key=lambda count: _plan_device_map(config, devices, workload, offloaded=count, draft=draft).fits,
        )
        plan = _plan_device_map(config, devices, workload, offloaded=fewest, draft=draft)
    if plan.host_weight_bytes <= host_memory:
        return plan
    lacking = plan.host_weight_bytes - host_memory
    return replace(plan, shortfall_bytes=plan.shortfall_bytes + lacking, device_map=None, tokens_per_second=None)


def _read_seconds(load: DeviceLoad, embedding: int) -> float:
    """Seconds to read once what a step needs: all weights but the embedding, of which it takes a row, and the cache."""
    if load.device.bandwidth is None:
        return math.nan
    return (load.weight_bytes - embedding + load.cache_bytes) / (REACHED_BANDWIDTH * load.device.bandwidth)


def _rate(workload: Workload, seconds: float) -> float | None:
    return None if math.isnan(seconds) else workload.batch / seconds


def largest_context(config: ModelSizes, devices: Sequence[Device], **options: Any) -> int:
    """Return the longest context that fits, 0 if none does; `options` are those of `plan_sharding`."""
    limit = config.max_position_embeddings
    return _largest(limit, lambda context: plan_sharding(config, devices, context=context, **options)[0].fits)


def largest_batch(config: ModelSizes, devices: Sequence[Device], *, batch: int, **options: Any) -> int:
    """Return the most sequences, fewer than `batch`, that fit at once, 0 if not even one does; options as above."""
    return _largest(batch - 1, lambda fewer: plan_sharding(config, devices, batch=fewer, **options)[0].fits)


def _largest(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, by bisection; 0 if none does."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))


def fewest_devices(config: ModelSizes, device: Device, **options: Any) -> int | None:
    """Return how many of one device it takes, None if no number up to 64 does; `options` as for `plan_sharding`."""
    counts: Iterable[int] = range(1, 65)
    return next((count for count in counts if plan_sharding(config, [device] * count, **options)[0].fits), None)
