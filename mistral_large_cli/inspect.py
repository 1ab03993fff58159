"""Printing of `mistral-large inspect`: what a folder is, what it holds, what loads it, what is wrong with it."""

import json
from dataclasses import asdict


def inspect(source: str, as_json: bool) -> None:
    """Inspect a folder or a repository and say what it is.

    Raises:
        MistralLargeError: the reasons of `inspect_checkpoint`.
    """
    from modeling_mistral_large.conversion.inspect import inspect_checkpoint

    inspection = inspect_checkpoint(source)
    if as_json:
        print(json.dumps(asdict(inspection), indent=2))
        return
    from rich.console import Console
    from rich.text import Text

    sizes = [size for size in inspection.file_bytes.values() if size is not None]
    rows = {
        "what": [inspection.kind],
        "geometry": [", ".join(f"{key} {value}" for key, value in (inspection.geometry or {}).items()) or "unknown"],
        "tensors": [
            f"{inspection.tensors} tensors, {inspection.parameters:,} parameters, "
            + ", ".join(f"{dtype} × {count}" for dtype, count in inspection.dtypes.items())
            + (f"; {inspection.bits_per_weight:.3f} bits a quantized weight" if inspection.bits_per_weight else "")
        ],
        "files": [f"{len(inspection.file_bytes)} × *.safetensors, {sum(sizes):,} bytes"],
        "tokenizer": [", ".join(inspection.tokenizer) or "none"],
        "licence": [inspection.licence or "none in the folder"],
        "loads with": list(inspection.loads_with) or ["nothing"],
        "findings": list(inspection.findings) or ["nothing is wrong"],
    }
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for label, lines in rows.items():
        style = "bold red" if label == "findings" and inspection.findings else ""
        for line in lines:
            console.print(Text.assemble((f"{label:12}", "dim"), (line, style)))
            label = ""
