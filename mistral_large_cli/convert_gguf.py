"""`mistral-large convert --to gguf`: what llama.cpp's tools will do, the progress, and what to do with the file."""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_large_conversion.checkpoint.hub import resolve_conversion_source
from mistral_large_conversion.errors import SettingError

from .convert_adapter import adapter_lines, adapter_report
from .terminal import console as safe_console
from .terminal import one_line, print_json, progress_bar


def convert_gguf(
    source: str,
    destination: Path,
    *,
    gguf_type: str | None,
    llama_cpp: Path | None,
    llama_quantize: Path | None,
    without_effect: Mapping[str, bool],
    hub: Mapping[str, Any],
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a GGUF file.

    without_effect: options of `convert`, with whether they are given.
    options: those of `prepare_gguf` that prepare the weights.

    Raises:
        SettingError: no llama.cpp is given, or an option that means nothing for a GGUF file.
    """
    from mistral_large_conversion.gguf import CONVERTER, QUANTIZER, REPOSITORY, prepare_gguf

    if (option := next((option for option, is_given in without_effect.items() if is_given), None)) is not None:
        raise SettingError(f"{option}: has no effect with --to gguf, where llama.cpp's tools write; leave it out")
    if llama_cpp is None:
        raise SettingError(
            f"--to gguf: needs llama.cpp, whose {CONVERTER} writes the file; get it with `git clone {REPOSITORY}` and "
            "add --llama-cpp llama.cpp"
        )
    console = safe_console(soft_wrap=True, stderr=as_json)
    folder = resolve_conversion_source(source, to="hf", **hub)
    conversion = prepare_gguf(
        folder,
        destination,
        name=(folder.resolve() if Path(source).exists() else Path(source)).name,
        gguf_type=gguf_type,
        llama_cpp=llama_cpp,
        quantizer=llama_quantize,
        **options,
    )
    conversion.check_destination()
    plan, remarks = conversion.conversion.plan, conversion.conversion.remarks
    tensors = sum(len(file.tensors) for file in plan.files)
    quantizer = conversion.quantizer
    tools = [f"{CONVERTER} --outtype {conversion.converted_type.lower()}"]
    tools += [] if quantizer is None else [f"{QUANTIZER} {conversion.gguf_type}"]
    report: dict[str, Any] = {
        "source": source,
        "destination": str(destination),
        "to": "gguf",
        "gguf_type": conversion.gguf_type,
        "source_dtypes": list(plan.source_dtypes),
        "adapter": None if plan.adapter is None else adapter_report(plan.adapter),
        "tensors": tensors,
        "tensor_bytes": plan.tensor_bytes,
        "estimated_bytes": conversion.file_bytes,
        "needed_bytes": conversion.needed_bytes,
        "tools": tools,
        "remarks": list(remarks),
    }
    if not as_json:
        console.print(
            f"from  {one_line(source)}: {tensors} tensors, {', '.join(plan.source_dtypes)}, "
            f"{plan.tensor_bytes / 1e9:,.2f} GB"
        )
        if plan.adapter is not None:
            for line in adapter_lines(plan.adapter, source):
                console.print(line)
        console.print(f"by    {', then '.join(tools)}")
        console.print(
            f"to    {one_line(str(destination))}: about {conversion.file_bytes / 1e9:,.2f} GB, and "
            f"{conversion.needed_bytes / 1e9:,.2f} GB of disk while it is written"
        )
        for remark in remarks:
            console.print(f"note  {one_line(remark)}")
    if dry_run:
        report["result"] = "planned"
        if not as_json:
            console.print("The source is complete and the destination has room; nothing was written.")
    else:
        started = time.monotonic()
        with progress_bar("converting", sum(conversion.step_bytes), console) as advance:
            conversion.run(advance)
        seconds, size = time.monotonic() - started, destination.stat().st_size
        report |= {"result": "converted", "bytes": size, "seconds": round(seconds, 3)}
        if not as_json:
            console.print(f"done  in {seconds:,.1f} s, {size:,} bytes")
            console.print("\nTry it:\n")
            console.print(f"llama-server -m {shlex.quote(str(destination))} --jinja")
    if as_json:
        print_json(report)
