"""`mistral-large convert` of an adapter, and what it prints of one that is merged."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mistral_large_conversion.checkpoint.adapter import Adapter
from mistral_large_conversion.checkpoint.adapter_folder import FILES, is_other_base
from mistral_large_conversion.errors import SettingError

from .options import DTYPES
from .terminal import console as safe_console
from .terminal import one_line, print_json


def convert_adapter(
    source: str,
    destination: Path,
    to: Literal["hf", "consolidated"],
    base: str | None,
    dtype: str | None,
    without_effect: Mapping[str, bool],
    *,
    as_json: bool,
) -> None:
    """Convert an adapter between PEFT's format and the vendor's.

    without_effect: options of `convert`, with whether they are given.

    Raises:
        SettingError: an option that means nothing for an adapter.
    """
    from mistral_large_conversion import convert_adapter as convert

    if (option := next((option for option, is_given in without_effect.items() if is_given), None)) is not None:
        raise SettingError(f"{option}: has no effect: {source} is an adapter, which is converted alone; leave it out")
    written = convert(source, destination, to=to, base=base, dtype=None if dtype is None else DTYPES[dtype])
    if as_json:
        report = {"source": source, "destination": str(destination), "to": to, "result": "converted"}
        print_json({**report, "adapter": adapter_report(written)})
        return
    console = safe_console(soft_wrap=True)
    console.print(f"from  {one_line(source)}: an adapter")
    console.print(f"to    {one_line(str(destination))}: {' and '.join(FILES[to])}, {written.description}")


def adapter_report(adapter: Adapter) -> dict[str, Any]:
    """What --json says of an adapter."""
    return {
        "name": adapter.name,
        "base": adapter.base,
        "ranks": list(adapter.ranks),
        "linear_layers": len(adapter.pairs),
        "files": adapter.checksums,
    }


def adapter_lines(adapter: Adapter, source: str) -> Iterator[str]:
    """What is printed of an adapter that is merged into `source`."""
    yield f"with  {one_line(adapter.name)}: {adapter.description}, merged"
    if adapter.base is not None and is_other_base(adapter.base, source):
        yield f"note: the adapter names {one_line(adapter.base)} as its base; the shapes fit {one_line(source)}, too"
