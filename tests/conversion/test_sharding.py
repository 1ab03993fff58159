"""Plans against sizes worked out by hand, against properties of every device set, and against measured memory."""

import itertools
import json
import re
import time
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import check_device_map  # type: ignore[import-untyped]  # accelerate does not type it
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from typer.testing import CliRunner

from mistral_large_cli import app, main
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_cli.plan import PlanOptions, smallest_changes
from mistral_large_conversion.checkpoint.quantization import Scheme
from mistral_large_conversion.errors import PlanError
from mistral_large_conversion.sharding.devices import Device, detect_devices, parse_devices
from mistral_large_conversion.sharding.memory import (
    DEQUANTIZED_AT_ONCE,
    GIB,
    PREFILL_CHUNK,
    Sizes,
    Workload,
    activation_bytes,
    cache_bytes_of_layer,
)
from mistral_large_conversion.sharding.plan import (
    LARGEST,
    RESERVE,
    ShardingPlan,
    _plan_device_map,
    _plan_offload,
    device_map_for,
    fewest_devices,
    largest_batch,
    largest_context,
    plan_sharding,
)
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.quantization.loading import quantize_modules_, use_kernels_
from tests.support.errors import raises_exactly
from tests.support.peak_memory import PeakMemory

CONFIG = MistralLargeConfig()
MODULES = {"model.embed_tokens", "model.rotary_emb", *(f"model.layers.{n}" for n in range(88)), "model.norm", "lm_head"}


def by_way(plans: list[ShardingPlan]) -> dict[str, ShardingPlan]:
    return {plan.strategy: plan for plan in plans}


# Worked out from the geometry alone: hidden size 12288, 28672 intermediate features, 96 query and 8 key-value heads of
# 128, 88 layers, a vocabulary of 32768; 2 bytes a value.
#   layer      2 * (2 * 12288**2 + 2 * 12288 * 1024 + 3 * 12288 * 28672 + 2 * 12288) = 2,768,289,792 bytes
#   embedding  2 * 32768 * 12288 = 805,306,368 bytes, and the head as much; the final norm 2 * 12288 = 24,576
#   cache      2 * 2 * 8 * 128 = 4,096 bytes a token in each layer, 88 * 4,096 = 360,448 in all
# For example 8x80GB, each an H100 of 79.6 GiB and 3.35 TB/s, at 4,096 tokens:
#   A device_map: 79.6 GiB less 2 GiB of reserve, 0.48 GiB of activations and the embedding are 76.37 GiB, which hold
#   29.4 layers of 2,768,289,792 + 4,096 * 4,096 bytes.
#   Tensor parallelism: the embedding whole, an eighth of the head, of each layer's matrices and of the cache: 31.36 GB
#   of weights and 0.18 GB of cache. With the reserve and 0.19 GiB of activations, 48.03 GiB are left. A token reads all
#   but the embedding: 3.35e12 * 0.9 / (30.56e9 + 0.18e9) = 98.1 tokens/s.
# Of a device_map: whether it fits, and how many layers each device has room for. Of tensor parallelism, where 8 heads
# can be shared: GiB left on each device, and tokens/s.
BY_HAND: list[tuple[str, int, int, bool, list[int], tuple[float, float] | None]] = [
    ("8x80GB", 4096, 1, True, [29] * 8, (48.03, 98.1)),
    ("8x80GB", 131072, 1, True, [24] * 8, (42.04, 82.7)),
    ("8x80GB", 131072, 4, True, [15, *[16] * 6, 15], (22.97, 222.6)),
    ("8x80GB", 8192, 32, True, [17] * 8, (31.04, 2277.3)),
    ("4x80GB", 4096, 1, True, [29] * 4, (19.36, 49.0)),
    ("4x80GB", 131072, 1, True, [24] * 4, (8.07, 41.3)),
    ("4x80GB", 65536, 4, False, [20, 21, 21, 20], (-4.03, 0)),
    ("3x80GB", 4096, 1, False, [29] * 3, None),
    ("5x80GB", 4096, 1, True, [29] * 5, None),
    ("2x80GB", 4096, 1, False, [29] * 2, (-37.97, 0)),
    ("2x141GB", 4096, 1, True, [52] * 2, (22.83, 35.1)),
    ("2x141GB", 65536, 1, True, [48] * 2, (12.32, 32.2)),
    ("2x141GB", 131072, 1, True, [44] * 2, (0.94, 29.6)),
    ("141GB", 4096, 1, False, [52], None),
    ("4x141GB", 131072, 4, True, [29] * 4, (33.27, 159.5)),
    ("2x180GB", 131072, 1, True, [56] * 2, (39.64, 47.5)),
    ("4xA100", 32768, 1, True, [28] * 4, (16.88, 28.6)),
    ("8x48GB", 32768, 1, True, [15] * 8, (12.12, 24.3)),
    ("8x24GB", 4096, 1, False, [8] * 8, (-7.57, 0)),
    ("8x40GB", 8192, 1, True, [13, *[14] * 6, 13], (7.85, 45.3)),
    ("141GB+2x80GB", 8192, 1, True, [52, 29, 29], None),
    ("12x24GB", 4096, 1, True, [8] * 12, None),
    ("6x80GB", 32768, 2, True, [26, *[27] * 4, 26], None),
]


@pytest.mark.parametrize(("text", "context", "batch", "fits", "room", "parallel"), BY_HAND)
def test_plans_are_those_worked_out_by_hand(
    text: str, context: int, batch: int, fits: bool, room: list[int], parallel: tuple[float, float] | None
) -> None:
    plans = by_way(plan_sharding(CONFIG, parse_devices(text), context=context, batch=batch))
    assert ("tensor parallel" in plans) == (parallel is not None)
    mapped = plans.get("device_map") or plans["one device"]
    assert mapped.fits == fits == (sum(room) >= 88)
    layers = [sum("layers" in module for module in load.modules) for load in mapped.loads]
    if fits:
        assert sum(layers) == 88
        assert all(count <= most for count, most in zip(layers, room, strict=True))
        assert max(layers) - min(layers) <= 1 or len(set(room)) > 1
        assert sum(load.weight_bytes for load in mapped.loads) == 245220139008
        assert sum(load.cache_bytes for load in mapped.loads) == 360448 * context * batch
    else:
        assert layers == room
        assert mapped.shortfall_bytes == (88 - sum(room)) * (2768289792 + 4096 * context * batch)
    if parallel is None:
        return
    left, rate = parallel
    shared = plans["tensor parallel"]
    assert {round(load.free_bytes / GIB, 2) for load in shared.loads} == {left}
    assert shared.fits == (left >= 0)
    assert shared.shortfall_bytes == sum(max(0, -load.free_bytes) for load in shared.loads)
    assert round(shared.tokens_per_second or 0, 1) == rate


# A layer's matrices have 2 * 12288**2 + 2 * 12288 * 1024 + 3 * 12288 * 28672 = 1,384,120,320 values, in
# 3 * 12288 + 2 * 1024 + 2 * 28672 = 96,256 rows or 1,384,120,320 / 128 = 10,813,440 groups; its norms: 49,152 bytes.
#   fp8   1,384,120,320 + 4 * 96,256 + 49,152 = 1,384,554,496 bytes a layer
#   int4  1,384,120,320 / 2 + 4 * 10,813,440 + 49,152 = 735,363,072 bytes a layer
#   nvfp4 1,384,120,320 / 2 + 1,384,120,320 / 16 + 7 * 4 + 49,152 = 778,616,860 bytes a layer
# An 8-bit cache has 2 bytes of scale for each vector: 88 * 2 * 8 * (128 + 2) = 183,040 bytes a token.
@pytest.mark.parametrize(
    ("text", "weights", "kv", "context", "weight_bytes", "cache_bytes", "room"),
    [
        ("141GB", "fp8", "auto", 4096, 123451432960, 360448, 104),
        ("141GB", "fp8", "auto", 65536, 123451432960, 360448, 88),
        ("141GB", "fp8", "fp8", 131072, 123451432960, 183040, 87),
        ("141GB", "int4", "auto", 131072, 66322587648, 360448, 114),
        ("80GB", "int4", "auto", 8192, 66322587648, 360448, 105),
        ("80GB", "nvfp4", "auto", 8192, 70128920992, 360448, 99),
        ("2x80GB", "fp8", "auto", 8192, 123451432960, 360448, 114),
        ("4x24GB", "int4", "auto", 4096, 66322587648, 360448, 118),
    ],
)
def test_plans_of_quantized_weights_are_those_worked_out_by_hand(
    text: str, weights: str, kv: str, context: int, weight_bytes: int, cache_bytes: int, room: int
) -> None:
    layer = {"fp8": 1384554496, "int4": 735363072, "nvfp4": 778616860}[weights]
    assert Sizes.of(CONFIG, weights).weights == weight_bytes == 88 * layer + 2 * 805306368 + 24576
    assert 88 * cache_bytes_of_layer(CONFIG, Workload(1, weights=weights, kv=kv)) == cache_bytes
    plans = by_way(plan_sharding(CONFIG, parse_devices(text), context=context, weights=weights, kv=kv))
    mapped = plans.get("device_map") or plans["one device"]
    assert mapped.weights == weights
    assert mapped.fits == (room >= 88)
    assert mapped.shortfall_bytes == max(0, 88 - room) * (layer + cache_bytes // 88 * context)


def test_the_weights_are_the_published_ones() -> None:
    assert Sizes.of(CONFIG, "bf16").weights == 245220139008
    assert Sizes.of(CONFIG, "fp32").weights == 2 * 245220139008
    assert 88 * cache_bytes_of_layer(CONFIG, Workload(131072)) == 47244640256


GPUS = st.builds(
    lambda gib, bandwidth: Device(f"{gib}GiB", gib * GIB, bandwidth),
    st.integers(1, 200),
    st.none() | st.floats(1e11, 1e13),
)
DEMANDS = st.fixed_dictionaries(
    {"context": st.sampled_from([1, 2048, 8192, 40000, 131072]), "batch": st.integers(1, 9)}
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(GPUS, min_size=1, max_size=12), DEMANDS, st.sampled_from([0, 64 * GIB, 512 * GIB]))
def test_every_plan_keeps_its_promises(devices: list[Device], workload: dict[str, Any], host_memory: int) -> None:
    plans = plan_sharding(CONFIG, devices, **workload, host_memory=host_memory)
    assert [plan.fits for plan in plans] == sorted((plan.fits for plan in plans), reverse=True)
    for plan in plans:
        assert (plan.shortfall_bytes == 0) == plan.fits
        if not plan.fits:
            assert plan.device_map is None
            continue
        # Every limit is respected, and all weights and all of the cache are somewhere.
        assert all(load.free_bytes >= 0 for load in plan.loads)
        assert (plan.tokens_per_second is None) == any(load.device.bandwidth is None for load in plan.loads)
        assert plan.host_weight_bytes <= host_memory
        if plan.strategy == "tensor parallel":
            continue
        assert sum(load.weight_bytes for load in plan.loads) + plan.host_weight_bytes == 245220139008
        assert sum(load.cache_bytes for load in plan.loads) == 360448 * workload["context"] * workload["batch"]
        # Every module once, layers whole and in their order.
        assert plan.device_map is not None
        assert set(plan.device_map) == MODULES
        places = [plan.device_map[f"model.layers.{layer}"] for layer in range(88)]
        assert [place for place, _ in itertools.groupby(places)] == sorted(set(places), key=places.index)
        on_devices = [place for place in places if place != "cpu"]
        assert on_devices == sorted(on_devices)
        assert places == [*on_devices, *["cpu"] * (88 - len(on_devices))]
        assert plan.host_weight_bytes == places.count("cpu") * 2768289792
        for load in plan.loads:
            (place,) = {plan.device_map[module] for module in load.modules}
            assert devices[int(place)] == load.device


@settings(max_examples=100, deadline=None)
@given(GPUS, st.integers(1, 16), DEMANDS)
def test_equal_devices_are_loaded_equally(device: Device, count: int, workload: dict[str, Any]) -> None:
    plans = by_way(plan_sharding(CONFIG, [device] * count, **workload))
    plan = plans.get("device_map") or plans["one device"]
    own = Workload(**workload)
    layer = 2768289792 + cache_bytes_of_layer(CONFIG, own)
    if plan.fits:
        totals = [load.total_bytes for load in plan.loads]
        assert max(totals) - min(totals) <= layer
        return
    # And where nothing is found, there is nothing.
    room = device.memory_bytes - RESERVE - activation_bytes(CONFIG, own)
    ends = [805306368, 805306368 + 24576] if count > 1 else [2 * 805306368 + 24576]
    rooms = [room - end for end in ends] + [room] * (count - len(ends))
    if min(rooms) >= 0:
        assert sum(each // layer for each in rooms) < 88


@pytest.mark.parametrize("text", ["4x80GB", "2x141GB", "80GB+3x48GB", "24GB"])
def test_what_is_asked_for_instead_fits_and_no_more_does(text: str) -> None:
    devices = parse_devices(text)
    context = largest_context(CONFIG, devices, batch=2)
    if context:
        assert plan_sharding(CONFIG, devices, context=context, batch=2)[0].fits
    if context < 131072:
        assert not plan_sharding(CONFIG, devices, context=context + 1, batch=2)[0].fits
    count = fewest_devices(CONFIG, devices[0], context=8192)
    assert count is not None
    assert plan_sharding(CONFIG, [devices[0]] * count, context=8192)[0].fits
    assert not plan_sharding(CONFIG, [devices[0]] * (count - 1), context=8192)[0].fits


def test_small_devices_are_left_out() -> None:
    plan = by_way(plan_sharding(CONFIG, parse_devices("1GiB+4x80GB+2GiB"), context=4096))["device_map"]
    assert [load.device.name for load in plan.loads] == ["80GB"] * 4
    assert set((plan.device_map or {}).values()) == {1, 2, 3, 4}


def test_nothing_is_offloaded_unless_asked_for() -> None:
    devices = parse_devices("141GB")
    assert [plan.strategy for plan in plan_sharding(CONFIG, devices, context=4096)] == ["one device"]
    offloaded, one = plan_sharding(CONFIG, devices, context=4096, host_memory=256 * 10**9)
    assert (offloaded.strategy, one.strategy) == ("device_map with offload", "one device")
    assert offloaded.fits
    # The first device has the cache of all layers, and room for the weights of one more.
    (load,) = offloaded.loads
    assert load.cache_bytes == 360448 * 4096
    assert load.activation_bytes == activation_bytes(CONFIG, Workload(4096)) + 2768289792
    assert offloaded.tokens_per_second == pytest.approx(
        1 / (offloaded.host_weight_bytes / 25e9 + (load.weight_bytes - 805306368 + load.cache_bytes) / (0.9 * 4.8e12))
    )
    # One layer less on the host would be one too many on the device.
    assert load.free_bytes < 2768289792
    short = plan_sharding(CONFIG, devices, context=4096, host_memory=64 * 10**9)[0]
    assert not short.fits


# Measured


def model_of(config: MistralLargeConfig) -> Any:
    return MistralLargeForCausalLM(config).bfloat16().eval()


def fill(cache: Any, config: MistralLargeConfig, batch: int, tokens: int) -> None:
    """Put keys and values of any content into a cache, as the chunks of so many tokens leave it."""
    assert config.num_key_value_heads is not None
    for layer in range(config.num_hidden_layers):
        empty = torch.zeros(batch, config.num_key_value_heads, tokens, config.head_dim, dtype=torch.bfloat16)
        cache.update(empty, empty.clone(), layer)


# The most memory is that of the last chunk. Where the chunks before it are not computed, the cache is as they leave it.
@pytest.mark.slow
@pytest.mark.parametrize(("heads", "hidden", "intermediate"), [(6, 192, 448), (3, 96, 224), (6, 96, 1024)])
@pytest.mark.parametrize(
    ("batch", "chunk", "context", "computed"),
    [
        (1, 1024, 1024, 1024),
        (1, 256, 1024, 1024),
        (1, 256, 2048, 256),
        (1, 64, 2048, 64),
        (2, 512, 512, 512),
        (2, 128, 1024, 128),
        (4, 64, 128, 128),
    ],
)
def test_memory_is_what_is_allocated(
    heads: int, hidden: int, intermediate: int, batch: int, chunk: int, context: int, computed: int
) -> None:
    config = MistralLargeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3,
        head_dim=64,
        num_hidden_layers=3,
    )
    model = model_of(config)
    ids = torch.randint(0, 1000, (batch, context))
    mask = torch.ones_like(ids)
    # A batch has rows of several lengths.
    mask[1:, :5] = 0
    memory = PeakMemory()
    with torch.no_grad(), memory:
        cache: Any = DynamicCache(config=config)
        if computed < context:
            fill(cache, config, batch, context - computed)
            # Of what fills it, nothing is left but the cache.
            memory.peak = 0
        for start in range(context - computed, context, chunk):
            end = start + chunk
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, logits_to_keep=1)
    workload = Workload(context, batch, prefill_chunk=chunk)
    planned = 3 * cache_bytes_of_layer(config, workload) + activation_bytes(config, workload)
    assert planned == pytest.approx(memory.peak, rel=0.1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 3 * cache_bytes_of_layer(config, workload)


def test_planned_weights_are_the_allocated_ones(tiny_config: MistralLargeConfig) -> None:
    tiny_config.num_hidden_layers = 7
    model = model_of(tiny_config)
    room = 2 * RESERVE // GIB
    devices = [Device("a", room * GIB), Device("b", room * GIB), Device("c", room * GIB)]
    plan = by_way(plan_sharding(tiny_config, devices, context=16))["device_map"]
    assert plan.device_map is not None
    check_device_map(model, plan.device_map)
    modules = dict(model.named_modules())
    for load in plan.loads:
        held = sum(weight.nbytes for name in load.modules for weight in modules[name].parameters())
        assert held == load.weight_bytes


def quantized_model(quantization: Scheme) -> Any:
    """A model with weights of zero, in the form they have in memory."""
    config = MistralLargeConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=3,
    )
    model = model_of(config)
    quantize_modules_(model, quantization)
    for name, tensor in model.state_dict().items():
        if name.endswith(("packed", "scale")) or tensor.dtype == torch.float8_e4m3fn:
            tensor.zero_()
    use_kernels_(model)
    return model


@pytest.mark.parametrize("quantization", ["fp8", "int4", "nvfp4"])
def test_planned_quantized_weights_are_the_allocated_ones(quantization: Scheme) -> None:
    model = quantized_model(quantization)
    config = model.config
    assert sum(tensor.nbytes for tensor in model.parameters()) == Sizes.of(config, quantization).weights
    ranks = [Sizes.of(config, quantization, ranks=2).weights] * 2
    shared = sum(ranks) - 1024 * 256 * 2 - 7 * 256 * 2
    # Each rank has the embedding, the norms, the scales of the rows it reads a part of, and global scales.
    again = {"fp8": 3 * 2 * 256 * 4, "int4": 0, "nvfp4": 3 * 7 * 4}[quantization]
    assert shared == Sizes.of(config, quantization).weights + again


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int4", "nvfp4"])
def test_4_bits_take_no_more_than_planned(quantization: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(DEQUANTIZED_AT_ONCE, device, 2**14)
    model = quantized_model(quantization)
    config = model.config
    cache: Any = DynamicCache(config=config)
    memory = PeakMemory()
    with torch.no_grad(), memory:
        model(torch.randint(0, 1000, (1, 256)), past_key_values=cache, logits_to_keep=1)
    workload = Workload(256, weights=quantization)
    planned = config.num_hidden_layers * cache_bytes_of_layer(config, workload) + activation_bytes(config, workload)
    assert planned * 0.75 < memory.peak < planned * 1.1


# What people write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x80GB", [("80GB", 79.6, 3.35)] * 8),
        ("h200", [("h200", 140.4, 4.8)]),
        (" 2 x A100 + 24gb", [("A100", 79.6, 2.039)] * 2 + [("24gb", 24.0, 1.008)]),
        ("4x95GiB@3.9", [("95GiB", 95.0, 3.9)] * 4),
        ("100GB", [("100GB", 1e11 / GIB, None)]),
        ("2xH100@2", [("H100", 79.6, 2.0)] * 2),
    ],
)
def test_devices_as_people_write_them(text: str, expected: list[tuple[str, float, float | None]]) -> None:
    assert parse_devices(text) == [
        Device(name, int(gib * GIB), None if rate is None else rate * 1e12) for name, gib, rate in expected
    ]


UNKNOWN_DEVICE = (
    "neither a known GPU (B200, GH200, H200, H200-NVL, H100, H100-NVL, H100-PCIE, H20, A100, A100-PCIE, A40, A30, A10, "
    "A10G, L40S, L40, L4, T4, V100, MI300X, MI325X, A6000, 6000-ADA, PRO-6000, A5000, 5090, 4090, 3090, 3090-TI), cpu, "
    "a Mac (mac-512GB, mac-256GB, mac-192GB, mac-128GB, mac-96GB) nor a size; write 8x80GB, 8xH100-PCIe or "
    "4x95GiB@3.9 for a size and a bandwidth in TB/s"
)
CONTEXT = "must be 1 to 131072 tokens, the context length of the model"


@pytest.mark.parametrize("text", ["", "8x", "0x80GB", "80", "0GB", "card", "2x80GB+", "80GB@", "-1x80GB", "8x80GB@x"])
def test_what_names_no_devices(text: str) -> None:
    # Of several, the one that is wrong is named.
    name = text.rpartition("+")[2]
    with raises_exactly(PlanError, f"devices '{name}': {UNKNOWN_DEVICE}"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"context": 0}, f"context 0: {CONTEXT}"),
        ({"context": 131073}, f"context 131073: {CONTEXT}"),
        ({"context": 1, "batch": 0}, f"batch 0: must be at least 1, and at most {2**62}"),
        ({"context": 1, "prefill_chunk": 0}, f"prefill_chunk 0: must be at least 1, and at most {2**62}"),
        ({"context": 1, "host_memory": -1}, f"host_memory -1: must be 0 or more bytes, and at most {2**62}"),
        ({"context": 1, "weights": "int3"}, "weights 'int3': must be one of bf16, fp16, fp32, fp8, int4, nvfp4"),
        ({"context": 1, "kv": "int3"}, "kv 'int3': must be one of auto, fp8"),
        ({"context": True}, f"context True: {CONTEXT}"),
        ({"context": 8.5}, f"context 8.5: {CONTEXT}"),
        ({"context": 1, "batch": 2**62 + 1}, f"batch {2**62 + 1}: must be at least 1, and at most {2**62}"),
        (
            {"context": 1, "weights": "fp8", "host_memory": 1},
            "host_memory with fp8 weights: quantized weights are not offloaded; leave it out",
        ),
    ],
)
def test_demands_that_make_no_sense(options: dict[str, Any], problem: str) -> None:
    with raises_exactly(PlanError, problem):
        plan_sharding(CONFIG, parse_devices("80GB"), **options)


@pytest.mark.parametrize("ask", [plan_sharding, device_map_for, largest_context, largest_batch, fewest_devices])
def test_a_misspelt_option_is_an_error(ask: Any) -> None:
    given: dict[Any, dict[str, int]] = {largest_context: {}, largest_batch: {"context": 1, "batch": 2}}
    devices: Any = parse_devices("80GB")[0] if ask is fewest_devices else parse_devices("80GB")
    with pytest.raises(TypeError, match="unexpected keyword argument 'kvv'"):
        ask(CONFIG, devices, **given.get(ask, {"context": 1}), kvv="fp8")


@pytest.mark.slow
def test_the_fewest_layers_are_offloaded() -> None:
    for text, context, batch in itertools.product(("24GB", "2x80GB", "24GB+80GB", "5x48GB"), (1, 8192, 60000), (1, 3)):
        devices = parse_devices(text)
        workload = Workload(context, batch)
        plan = _plan_offload(CONFIG, devices, workload, LARGEST)
        one_by_one = (_plan_device_map(CONFIG, devices, workload, offloaded=count) for count in range(1, 89))
        fitting = next((each for each in one_by_one if each.fits), None)
        if fitting is None:
            assert not plan.fits
        elif plan.fits:
            assert plan == fitting


def test_the_largest_batch_is_the_last_that_fits() -> None:
    devices = parse_devices("4x80GB")
    batch = largest_batch(CONFIG, devices, context=8192, batch=10**12)
    assert plan_sharding(CONFIG, devices, context=8192, batch=batch)[0].fits
    assert not plan_sharding(CONFIG, devices, context=8192, batch=batch + 1)[0].fits
    assert largest_batch(CONFIG, parse_devices("24GB"), context=8192, batch=2) == 0


def test_a_plan_takes_time_with_the_size_of_what_is_asked() -> None:
    deep = MistralLargeConfig(num_hidden_layers=10_000, hidden_size=256, intermediate_size=512)
    started = time.process_time()
    smallest_changes(deep, parse_devices("8x24GB"), PlanOptions(131072, batch=10**9))
    # One by one, a thousand million batches.
    assert time.process_time() - started < 30


def test_no_devices() -> None:
    with raises_exactly(PlanError, "no devices: a plan needs at least one; name them as in 8x80GB"):
        plan_sharding(CONFIG, [], context=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs to be found")
def test_no_devices_here() -> None:
    with raises_exactly(PlanError, "no GPUs are found here; name those you mean, as in 8x80GB"):
        detect_devices()


def test_device_maps_for_from_pretrained() -> None:
    # Tensor parallelism, which would be faster, has none.
    device_map = device_map_for(CONFIG, parse_devices("4x80GB"), context=4096)
    assert set(device_map) == MODULES
    with raises_exactly(
        PlanError,
        "no room for 90.2 GiB on these 1 devices; take more of them, a shorter context or a smaller batch, or let "
        "weights lie in the host's memory (host_memory)",
    ):
        device_map_for(CONFIG, parse_devices("141GB"), context=1)


# By name: how many, GiB as the driver reports them, and GB/s on the vendor's sheet.
NAMED: dict[str, tuple[int, float, float]] = {
    "8xA100-80GB": (8, 79.6, 2039),
    "A100-PCIe-40GB": (1, 39.6, 1555),
    "4x4090": (4, 24, 1008),
    "RTX 4090": (1, 24, 1008),
    "2 x rtx4090": (2, 24, 1008),
    "NVIDIA GeForce RTX 4090": (1, 24, 1008),
    "3090": (1, 24, 936),
    "RTX 3090Ti": (1, 24, 1008),
    "2xH100-SXM": (2, 79.6, 3350),
    "NVIDIA H100 80GB HBM3": (1, 79.6, 3350),
    "H100-PCIe": (1, 79.6, 2000),
    "h100 nvl": (1, 93.6, 3900),
    "a6000": (1, 48, 768),
    "RTX 6000 Ada": (1, 48, 960),
    "L4": (1, 22.5, 300),
    "T4": (1, 15, 320),
    "V100": (1, 32, 900),
    "Tesla V100-SXM2-16GB": (1, 16, 900),
    "MI300X": (1, 192, 5300),
    # Three quarters of the memory, which is in GiB.
    "mac-192GB": (1, 144, 800),
    "mac-512GB@0.7": (1, 384, 700),
    "CPU-512GiB@0.2": (1, 512, 200),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_devices_have_the_figures_of_their_sheets(name: str) -> None:
    count, memory_gib, bandwidth = NAMED[name]
    devices = parse_devices(name)
    assert len(devices) == count
    assert (devices[0].memory_bytes, round((devices[0].bandwidth or 0) / 1e9)) == (int(memory_gib * GIB), bandwidth)
    # As it is written in a command that a plan prints.
    assert parse_devices(devices[0].name)[0].memory_bytes == devices[0].memory_bytes


def test_this_machine_is_a_device_of_unknown_bandwidth() -> None:
    (device,) = parse_devices("cpu")
    assert (device.kind, device.bandwidth, device.memory_bytes > GIB) == ("cpu", None, True)
    assert device.assumption == "cpu: the memory of this machine"


@pytest.mark.parametrize("name", ["A100-60GB", "NVIDIA GeForce RTX 4090 Laptop GPU", "mac-100GB", "cpu-lots", "GB"])
def test_an_unknown_device_is_refused_with_those_that_are_known(name: str) -> None:
    with raises_exactly(PlanError, f"devices '{name}': {UNKNOWN_DEVICE}"):
        parse_devices(name)


# The command


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments])
    return result.exit_code, result.stdout


def test_the_command_says_how_to_run_what_fits() -> None:
    code, printed = run("--gpus", "4x80GB", "--context", "32768")
    assert code == 0
    assert "228.4 GiB of weights in bf16, 11.0 GiB of cache for 1 × 32,768 tokens" in printed
    assert "torchrun --nproc-per-node 4 --no-python mistral-large chat mistralai/Mistral-Large-Instruct-2407" in printed
    assert printed.count("80GB") == 4


def test_the_command_says_what_would_fit() -> None:
    code, printed = run("--gpus", "2x141GB", "--context", "131072", "--batch", "2")
    assert code == 1
    changes = dict(line.split()[:2] for line in printed.splitlines() if line.startswith("  --"))
    assert set(changes) == {"--batch", "--context", "--gpus", "--host", "--weights"}
    assert run("--gpus", "2x141GB", "--context", "131072", "--batch", "2", "--weights", changes["--weights"])[0] == 0
    assert run("--gpus", "2x141GB", "--context", changes["--context"], "--batch", "2")[0] == 0
    assert run("--gpus", changes["--gpus"], "--context", "131072", "--batch", "2")[0] == 0
    asked = ("--gpus", "2x141GB", "--context", "131072", "--batch", "2", "--host")
    assert run(*asked, changes["--host"].rstrip(","))[0] == 0
    assert run(*asked, "10GB")[0] == 1


def test_smaller_parts_of_the_prompt_and_a_smaller_cache_may_help() -> None:
    whole = ("--gpus", "141GB", "--context", "131072", "--weights", "fp8")
    assert run(*whole)[0] == 1
    code, printed = run(*whole, "--kv", "fp8")
    assert code == 1
    assert "  --prefill-chunk 1024\n" in printed
    code, printed = run(*whole, "--kv", "fp8", "--prefill-chunk", "1024")
    assert code == 0
    assert printed.endswith("-fp8 --device-map cuda --kv fp8 --prefill-chunk 1024\n")
    code, printed = run("--gpus", "141GB", "--context", "90000", "--weights", "fp8")
    assert (code, "  --kv fp8\n" in printed) == (1, True)
    assert run("--gpus", "141GB", "--context", "90000", "--weights", "fp8", "--kv", "fp8")[0] == 0


@pytest.mark.parametrize("command", ["chat", "plan"])
def test_the_commands_read_as_much_at_once_as_the_model(command: str) -> None:
    commands = {each.callback.__name__: each.callback for each in app.registered_commands if each.callback}
    assert signature(commands[command]).parameters["prefill_chunk"].default == PREFILL_CHUNK


def test_the_command_prints_every_figure() -> None:
    code, printed = run("--gpus", "8x80GB", "--context", "4096", "--json")
    report = json.loads(printed)
    assert code == 0
    assert (report["weight_bytes"], report["cache_bytes"], report["fits"]) == (245220139008, 360448 * 4096, True)
    strategies = [(each["strategy"], each["weights"]) for each in report["strategies"]]
    parallel = "tensor parallel"
    assert strategies == [(parallel, "bf16"), ("device_map", "bf16"), (parallel, "fp8"), (parallel, "int4")]
    assert len(report["strategies"][1]["device_map"]) == len(MODULES)
    code, printed = run("--gpus", "80GB", "--json")
    report = json.loads(printed)
    assert (code, report["fits"], report["run"]) == (1, False, None)
    assert report["changes"]["gpus"] == "--gpus 4x80GB"


def test_a_plan_for_a_mac_or_a_cpu_is_for_one_machine() -> None:
    # 61.8 GiB of 4-bit weights and a cache of 2.8 GiB at 0.9 × 800 GB/s, the embedding not read.
    code, printed = run("--gpus", "mac-192GB", "--weights", "int4", "--json")
    report = json.loads(printed)
    read = report["weight_bytes"] - 805306368 + report["cache_bytes"]
    assert code == 0
    assert report["strategies"][0]["tokens_per_second"] == pytest.approx(0.9 * 800e9 / read)
    assert report["run"].endswith("-int4 --device-map mps")
    assert report["assumptions"] == [parse_devices("mac-192GB")[0].assumption]
    # Apple GPUs have no FP8, and nobody adds another Mac.
    code, printed = run("--gpus", "mac-192GB")
    assert code == 1
    assert re.findall("  (--.*)", printed) == ["--weights int4"]
    code, printed = run("--gpus", "cpu-512GB@0.2", "--weights", "bfloat16")
    assert code == 0
    assert "mistral-large chat mistralai/Mistral-Large-Instruct-2407 --device-map cpu\n" in printed


def test_the_command_reads_geometries(tmp_path: Path) -> None:
    folder = assemble_demo_checkpoint(tmp_path / "demo")
    code, printed = run(str(folder), "--gpus", "24GB", "--json")
    assert code == 0
    sizes = Sizes.of(MistralLargeConfig.from_pretrained(folder), "bf16")
    assert json.loads(printed)["weight_bytes"] == sizes.weights < 10**7
    code, printed = run(str(folder), "--gpus", "24GB", "--kv", "fp8")
    assert f"mistral-large chat {folder} --device-map cuda --kv fp8\n" in printed


def test_the_code_it_prints_makes_the_plan() -> None:
    asked = ("--gpus", "5x80GB", "--context", "9000", "--batch", "2", "--kv", "fp8", "--prefill-chunk", "512")
    _, printed = run(*asked)
    lines = printed.partition("Run it:\n\n")[2].splitlines()
    planned = next(line for line in lines if line.startswith("device_map = "))
    config: Any = MistralLargeConfig()
    found: dict[str, Any] = {"config": config, "device_map_for": device_map_for}
    found["detect_devices"] = lambda: parse_devices("5x80GB")
    exec(planned, found)
    report = json.loads(run(*asked, "--json")[1])
    assert found["device_map"] == report["strategies"][0]["device_map"]
    assert lines[-1] == "model.generate(..., past_key_values=Fp8Cache(config), prefill_chunk_size=512)"
    compile("\n".join(lines), "printed", "exec")


def test_quantized_weights_are_converted_first() -> None:
    code, printed = run("--gpus", "141GB", "--weights", "int4")
    steps = printed.partition("Run it:\n\n")[2].splitlines()
    assert code == 0
    name = "Mistral-Large-Instruct-2407"
    assert steps[0] == f"mistral-large convert mistralai/{name} {name}-int4 --quantize int4"
    assert steps[-1] == f"mistral-large chat {name}-int4 --device-map cuda"


@pytest.mark.slow
def test_errors_of_the_command_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "mistral_large", "head_dim": 3}')
    for arguments in (
        ["--gpus", "card"],
        [str(tmp_path), "--gpus", "80GB"],
        [str(tmp_path / "other"), "--gpus", "80GB"],
        [str(tmp_path / "none"), "--gpus", "80GB"],
        ["--gpus", "80GB", "--host", "much"],
        ["--gpus", "80GB", "--host", "9" * 400 + "GB"],
        ["--gpus", "9" * 400 + "GB"],
        ["--gpus", "80GB@" + "9" * 400],
        ["--gpus", "80GB@0"],
        ["--gpus", "999x80GB+" * 11_000 + "80GB"],
        ["--gpus", "999x80GB+999x80GB"],
        ["--gpus", "a" * 100_000],
        ["--gpus", " " * 100_000],
        ["--gpus", "80GB", "--batch", "1" * 400],
        ["--gpus", "80GB", "--context", "1" * 400],
        ["--gpus", "80GB", "--prefill-chunk", "1" * 400],
        # Options without effect.
        ["--gpus", "24GB", "--weights", "int4", "--host", "999GB"],
        ["--gpus", "cpu-512GB", "--host", "999GB"],
        ["--gpus", "mac-192GB", "--weights", "fp8"],
        ["--gpus", "mac-192GB", "--weights", "nvfp4"],
        ["--gpus", "mac-192GB", "--kv", "fp8"],
        ["--gpus", "2xmac-192GB"],
        ["--gpus", "80GB+cpu"],
        ["--gpus", "80GB", "--token", "hf_x"],
        [str(tmp_path), "--gpus", "80GB", "--revision", "main"],
    ):
        monkeypatch.setattr("sys.argv", ["mistral-large", "plan", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("mistral-large: ")
        assert captured.err.count("\n") == 1
        assert len(captured.err) < 1000
