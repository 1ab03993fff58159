"""GPUs as people write them, with their memory and bandwidth; those of this machine."""

import re
from dataclasses import dataclass, replace

from mistral_large_conversion.checkpoint.source_files import shown
from mistral_large_conversion.errors import PlanError
from mistral_large_conversion.sharding.memory import GIB

# Name, memory as the driver reports it in GiB, bandwidth in TB/s as the vendor's sheet has it.
CARDS: dict[str, tuple[float, float]] = {
    "A100-40GB": (39.6, 1.555),
    "A100": (79.6, 2.039),
    "A6000": (48.0, 0.768),
    "B200": (179.1, 7.7),
    "H100": (79.6, 3.35),
    "H200": (140.4, 4.8),
    "L40S": (45.0, 0.864),
    "RTX4090": (24.0, 1.008),
}

# What people call cards by.
CARDS_BY_SIZE = {
    "24GB": "RTX4090",
    "40GB": "A100-40GB",
    "48GB": "L40S",
    "80GB": "H100",
    "141GB": "H200",
    "180GB": "B200",
}

MOST_DEVICES = 1024

# A number of devices, what they are, and their bandwidth.
DEVICES = r"\s*(?:(\d{1,3})\s*x\s*)?([\w.-]+?)(?:@(\d{1,6}(?:\.\d{1,12})?))?\s*"


@dataclass(frozen=True)
class Device:
    """A GPU: `memory` in bytes, `bandwidth` in bytes a second, or None where it is not known."""

    name: str
    memory: int
    bandwidth: float | None = None


def parse_devices(text: str) -> list[Device]:
    """Read devices as people write them: `8x80GB`, `h200`, `2xA100+1x24GB`, `4x95GiB@3.9` with TB/s after the @.

    Raises:
        PlanError: a part that names no device.
    """
    devices = []
    # A list of any length is read no further than the most devices reach.
    for part in text.split("+", MOST_DEVICES + 1):
        match = re.fullmatch(DEVICES, part, re.IGNORECASE | re.ASCII)
        device = match and _parse_device(match[2])
        if not match or not device or int(match[1] or 1) < 1 or (match[3] and float(match[3]) == 0):
            raise PlanError(
                f"devices {shown(part)}: neither a known card ({', '.join(CARDS)}) nor a size; write 8x80GB, H200 or "
                "4x95GiB@3.9 for a size and a bandwidth in TB/s"
            )
        if match[3]:
            device = replace(device, bandwidth=float(match[3]) * 1e12)
        devices += [device] * int(match[1] or 1)
        if len(devices) > MOST_DEVICES:
            raise PlanError(f"devices {shown(text)}: more than {MOST_DEVICES}; no plan shares a model among so many")
    return devices


def _parse_device(name: str) -> Device | None:
    upper = name.upper()
    if card := CARDS.get(CARDS_BY_SIZE.get(upper, upper)):
        return Device(name, int(card[0] * GIB), card[1] * 1e12)
    size = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)(GI?B)", upper)
    if size is None or float(size[1]) == 0:
        return None
    # What a card is called counts neither the driver's share nor, always, in powers of two: this is never too much.
    return Device(name, int(float(size[1]) * (GIB if size[2] == "GIB" else 1e9)))


def detect_devices() -> list[Device]:
    """Return the GPUs of this machine.

    Raises:
        PlanError: there are none.
    """
    import torch

    if not torch.cuda.is_available():
        raise PlanError("no GPUs are found here; name those you mean, as in 8x80GB")
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        known = (CARDS[name] for name in CARDS if name.replace("RTX", "RTX ") in properties.name)
        bandwidth = next((1e12 * card[1] for card in known), None)
        devices.append(Device(properties.name, properties.total_memory, bandwidth))
    return devices
