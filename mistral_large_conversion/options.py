"""Options of the acts: one of a few values, and sizes as people write them."""

import re
from collections.abc import Iterable

from mistral_large_conversion.checkpoint.source_files import is_one_of, shown
from mistral_large_conversion.errors import CheckpointError, SettingError

SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def check_option(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse an option whose value means nothing.

    Raises:
        SettingError: the option, its value and what it may be.
    """
    values = tuple(allowed)
    if not is_one_of(value, values):
        raise SettingError(f"{name} {shown(value)}: must be one of {', '.join(map(repr, values))}")


def parse_size(size: int | str, what: str = "max_shard_size") -> int:
    """Bytes of a size such as 5GB, 750 MB or 1000000; `what` has that size, for the error."""
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,12})?)\s*([KMGT]?B|)\s*", str(size), re.IGNORECASE)
    size_bytes = int(float(match[1]) * SIZE_UNITS[match[2].upper()]) if match else 0
    if size_bytes < 1:
        raise CheckpointError(f"{what} {shown(size)}: must be a size such as 5GB or 750MB")
    return size_bytes
