"""`mistral-large inspect`."""

from dataclasses import asdict

from mistral_large_conversion.checkpoint.calibration import Calibration

from .options import AsJson, CacheDir, Revision, Source, Token, hub_options
from .terminal import console, one_line, print_json


def inspect(
    source: Source,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Print what a checkpoint holds, what loads it and what is wrong with it; only the headers of weights are read."""
    hub = hub_options(source, revision, token, cache_dir)
    from mistral_large_conversion.inspect import inspect_checkpoint

    inspection = inspect_checkpoint(source, **hub)
    if as_json:
        print_json(asdict(inspection))
        return
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
        **(
            {}
            if inspection.calibration is None
            else {"calibration": [Calibration(**inspection.calibration).description]}
        ),
        "files": [f"{len(inspection.file_bytes)} × *.safetensors, {sum(sizes):,} bytes"],
        "tokenizer": [", ".join(inspection.tokenizer) or "none"],
        "vocabulary": [inspection.vocabulary or "unknown"],
        "prompts": [inspection.prompts or "unknown"],
        "licence": [inspection.licence or "none in the folder"],
        "loads with": list(inspection.loads_with) or ["nothing"],
        "notes": list(inspection.notes) or ["none"],
        "problems": list(inspection.problems) or ["none"],
    }
    out = console(soft_wrap=True)
    for label, lines in rows.items():
        style = "bold red" if label == "problems" and inspection.problems else ""
        for line in lines:
            # A value with a line of its own could deny what the next one says.
            out.print(Text.assemble((f"{label:12}", "dim"), (one_line(line), style)))
            label = ""
