"""GPUs as people write them, with their memory and bandwidth; those of this machine."""

import os
import re
from dataclasses import dataclass, replace
from typing import Literal

from mistral_large_conversion.checkpoint.source_files import shown
from mistral_large_conversion.errors import PlanError
from mistral_large_conversion.sharding.memory import GIB

# By the name without maker, series and form factor: for each size that is sold, the GB on its sheet, the memory that
# the driver reports in GiB, and the bandwidth on the vendor's sheet in TB/s. The first size is meant where none is
# named.
GPUS: dict[str, tuple[tuple[int, float, float], ...]] = {
    # Data centres, NVIDIA
    "B200": ((180, 179.1, 7.7),),
    "GH200": ((96, 95.6, 4.0),),
    "H200": ((141, 140.4, 4.8),),
    "H200-NVL": ((141, 140.4, 4.8),),
    "H100": ((80, 79.6, 3.35),),
    "H100-NVL": ((94, 93.6, 3.9),),
    "H100-PCIE": ((80, 79.6, 2.0),),
    "H20": ((96, 95.6, 4.0),),
    "A100": ((80, 79.6, 2.039), (40, 39.6, 1.555)),
    "A100-PCIE": ((80, 79.6, 1.935), (40, 39.6, 1.555)),
    "A40": ((48, 45.0, 0.696),),
    "A30": ((24, 24.0, 0.933),),
    "A10": ((24, 22.5, 0.6),),
    "A10G": ((24, 22.5, 0.6),),
    "L40S": ((48, 45.0, 0.864),),
    "L40": ((48, 45.0, 0.864),),
    "L4": ((24, 22.5, 0.3),),
    "T4": ((16, 15.0, 0.32),),
    "V100": ((32, 32.0, 0.9), (16, 16.0, 0.9)),
    # Data centres, AMD
    "MI300X": ((192, 192.0, 5.3),),
    "MI325X": ((256, 256.0, 6.0),),
    # Workstations
    "A6000": ((48, 48.0, 0.768),),
    "6000-ADA": ((48, 48.0, 0.96),),
    "PRO-6000": ((96, 95.6, 1.792),),
    "A5000": ((24, 24.0, 0.768),),
    # Desktops
    "5090": ((32, 31.8, 1.792),),
    "4090": ((24, 24.0, 1.008),),
    "3090": ((24, 24.0, 0.936),),
    "3090-TI": ((24, 24.0, 1.008),),
}
# What people call GPUs by.
GPUS_BY_SIZE = {"24GB": "4090", "40GB": "A100-40GB", "48GB": "L40S", "80GB": "H100", "141GB": "H200", "180GB": "B200"}
# Parts of a name that say nothing of memory and bandwidth that the others do not.
UNSAID = re.compile(
    r"NVIDIA|AMD|INSTINCT|GEFORCE|TESLA|RTX|SXM\d?|HBM\d?E?|GENERATION|BLACKWELL|WORKSTATION|SERVER|EDITION", re.ASCII
)
# Macs by the GB of their unified memory: the chip that is assumed, and its bandwidth in TB/s. Where several chips come
# with an amount, the slowest of those that are sold with it.
MACS = {
    512: ("M3 Ultra", 0.819),
    256: ("M3 Ultra", 0.819),
    192: ("M2 Ultra", 0.8),
    128: ("M3 Max", 0.4),
    96: ("M3 Max", 0.3),
}
# Of a Mac's memory, macOS gives this part to the GPU unless it is told otherwise.
MAC_SHARE = 0.75

MOST_DEVICES = 1024

# A number of devices, what they are, and their bandwidth.
DEVICES = r"(?:(\d{1,3})\s*x\s*)?([\w.-][\w. -]{0,60}?)\s*(?:@\s*(\d{1,6}(?:\.\d{1,12})?))?"


@dataclass(frozen=True)
class Device:
    """A device: `memory_bytes`, `bandwidth` in bytes a second, or None where it is not known.

    kind: the device of torch.
    assumption: what was taken for granted of it, for people to read; "" where nothing was.
    """

    name: str
    memory_bytes: int
    bandwidth: float | None = None
    kind: Literal["cuda", "mps", "cpu"] = "cuda"
    assumption: str = ""


def parse_devices(text: str) -> list[Device]:
    """Read devices as people write them: `8xA100-80GB`, `h200`, `2xA100+1x24GB`, `4x95GiB@3.9` with TB/s after the @.

    `cpu` is this machine's memory, `cpu-512GB` another one's, and `mac-192GB` a Mac's unified memory.

    Raises:
        PlanError: a part that names no device.
    """
    devices = []
    # A list of any length is read no further than the most devices reach.
    for part in text.split("+", MOST_DEVICES + 1):
        match = re.fullmatch(DEVICES, part.strip(), re.IGNORECASE | re.ASCII)
        device = match and _parse_device(" ".join(match[2].split()).replace(" ", "-"))
        if not match or not device or int(match[1] or 1) < 1 or (match[3] and float(match[3]) == 0):
            raise PlanError(
                f"devices {shown(part)}: neither a known GPU ({', '.join(GPUS)}), cpu, a Mac "
                f"({', '.join(f'mac-{size}GB' for size in MACS)}) nor a size; write 8x80GB, 8xH100-PCIe or 4x95GiB@3.9 "
                "for a size and a bandwidth in TB/s"
            )
        if match[3]:
            device = replace(device, bandwidth=float(match[3]) * 1e12)
        devices += [device] * int(match[1] or 1)
        if len(devices) > MOST_DEVICES:
            raise PlanError(
                f"devices {shown(text)}: more than {MOST_DEVICES}; no plan shards a model over more; name fewer"
            )
    if len(devices) > 1 and any(device.kind != "cuda" for device in devices):
        raise PlanError(
            f"devices {shown(text)}: a CPU or a Mac next to other devices; a plan with one has no others; name it alone"
        )
    return devices


def _parse_device(name: str) -> Device | None:
    upper = name.upper()
    if upper == "CPU":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Device(name, memory, kind="cpu", assumption=f"{name}: the memory of this machine")
    if upper.startswith("CPU-"):
        size_bytes = _parse_size(upper.removeprefix("CPU-"))
        return None if size_bytes is None else Device(name, size_bytes, kind="cpu")
    if mac := re.fullmatch(r"MAC-(\d{1,4})GB", upper):
        return _mac(name, int(mac[1]))
    if gpu := find_gpu(GPUS_BY_SIZE.get(upper, upper)):
        memory_gib, bandwidth = gpu
        return Device(name, int(memory_gib * GIB), bandwidth * 1e12)
    # What a GPU is called counts neither the driver's share nor, always, in powers of two: this is never too much.
    size_bytes = _parse_size(upper)
    return None if size_bytes is None else Device(name, size_bytes)


def find_gpu(name: str) -> tuple[float, float] | None:
    """Return the memory in GiB and the bandwidth in TB/s of a GPU as people or its driver name it, None if unknown."""
    words = [word for word in re.split(r"[\s_-]+|(?<=\d)(?=TI\b)", UNSAID.sub("-", name.upper())) if word]
    sizes = [int(word.removesuffix("GB")) for word in words if re.fullmatch(r"\d{1,4}GB", word)]
    variants = GPUS.get("-".join(word for word in words if not re.fullmatch(r"\d{1,4}GB", word)), ())
    return next((variant[1:] for variant in variants if sizes in ([], [variant[0]])), None)


def _parse_size(text: str) -> int | None:
    """Return the bytes of a size such as 95GIB or 80GB, None if it is none."""
    size = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)(GI?B)", text)
    return int(float(size[1]) * (GIB if size[2] == "GIB" else 1e9)) or None if size else None


def _mac(name: str, size: int) -> Device | None:
    if size not in MACS:
        return None
    chip, bandwidth = MACS[size]
    assumption = (
        f"{name}: a chip as fast as {chip}, {bandwidth * 1000:.0f} GB/s, and {MAC_SHARE:.0%} of the unified memory for "
        f"the GPU, as macOS has it; write {name}@0.8 for another bandwidth in TB/s"
    )
    return Device(name, int(size * GIB * MAC_SHARE), bandwidth * 1e12, kind="mps", assumption=assumption)


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
        known = find_gpu(properties.name)
        devices.append(Device(properties.name, properties.total_memory, known and known[1] * 1e12))
    return devices
