"""Where a model runs: devices, the memory that each of them has to hold, and the fastest strategies."""

from mistral_large_conversion.sharding.devices import Device, detect_devices, parse_devices
from mistral_large_conversion.sharding.memory import Draft, Workload
from mistral_large_conversion.sharding.plan import (
    DeviceLoad,
    ShardingPlan,
    device_map_for,
    fewest_devices,
    largest_batch,
    largest_context,
    plan_sharding,
)

__all__ = [
    "Device",
    "DeviceLoad",
    "Draft",
    "ShardingPlan",
    "Workload",
    "detect_devices",
    "device_map_for",
    "fewest_devices",
    "largest_batch",
    "largest_context",
    "parse_devices",
    "plan_sharding",
]
