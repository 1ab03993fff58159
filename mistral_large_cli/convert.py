"""`mistral-large convert`: the plan, the progress, and what to do with the result."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import DTYPES, AsJson, CacheDir, Dtype, Revision, Source, Token, hub_options
from .terminal import console as safe_console
from .terminal import one_line, print_json, progress_bar

if TYPE_CHECKING:
    from mistral_large_conversion.destination import State

CHAT = """\
from transformers import pipeline
chat = pipeline("text-generation", {folder!r}, dtype="auto", device_map="auto")
response = chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)
print(response[0]["generated_text"][-1]["content"])"""
# By layout and model type; the consolidated layout is read unchanged.
SNIPPETS = {
    ("hf", "mistral_large"): f"import modeling_mistral_large\n{CHAT}",
    ("hf", "mistral"): CHAT,
    ("consolidated", "mistral_large"): """\
from modeling_mistral_large import MistralLargeForCausalLM
print(MistralLargeForCausalLM.from_pretrained({folder!r}, dtype="auto"))""",
}
STATES: dict["State", str] = {
    "new": "a new folder",
    "unfinished": "an interrupted conversion, to be resumed",
    "finished": "a finished conversion, to be compared with the source",
}


def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(file_okay=False, help="Folder to write, new or empty.")],
    to: Annotated[Literal["hf", "consolidated"], typer.Option(help="Layout to write, from the other one.")] = "hf",
    as_: Annotated[
        Literal["mistral_large", "mistral"] | None,
        typer.Option(
            "--as",
            help="Model type of the HF layout. mistral: for engines without this package.",
            show_default="mistral_large",
        ),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of an output file, such as 5GB.")] = "5GB",
    dtype: Annotated[Dtype | None, typer.Option(help="Round the weights; without it, every bit is kept.")] = None,
    quantize: Annotated[
        Literal["fp8", "int4"] | None,
        typer.Option(help="Quantize the linear layers to 8 or 4 bits, round to nearest, without calibration."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads. The bytes are the same with any number.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source and print the plan only.")] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint between the vendor's layout and that of transformers, a few megabytes in memory at a time.

    Run an interrupted conversion again to resume it; a finished one is compared with its source.
    """
    from mistral_large_conversion.errors import SettingError

    if to == "consolidated" and as_ is not None:
        raise SettingError(f"--as {as_} with --to consolidated: that layout has no model type; leave it out")
    if dry_run and jobs is not None:
        raise SettingError(f"--jobs {jobs} with --dry-run: nothing is written; leave one out")
    model_type = as_ or "mistral_large"
    hub = hub_options(source, revision, token, cache_dir)
    from mistral_large_conversion import prepare_conversion
    from mistral_large_conversion.checkpoint.hub import CONSOLIDATED_FILES, HF_FILES, resolve_source
    from mistral_large_conversion.quantize import ConstantTensor

    # With JSON, people read standard error.
    console = safe_console(soft_wrap=True, stderr=as_json)
    conversion = prepare_conversion(
        resolve_source(source, patterns=CONSOLIDATED_FILES if to == "hf" else HF_FILES, **hub),
        destination,
        to=to,
        model_type=model_type,
        dtype=None if dtype is None else DTYPES[dtype],
        quantize=quantize,
        max_shard_size=max_shard_size,
    )
    state = conversion.check_destination()
    plan = conversion.plan
    tensors = sum(not isinstance(tensor.source, ConstantTensor) for file in plan.files for tensor in file.tensors)
    dtypes = ", ".join(plan.source_dtypes)
    rounded = f", rounded to {plan.dtype}" if plan.cast else ""
    if quantize is not None:
        rounded += f", linear layers quantized to {quantize}"
    report: dict[str, Any] = {
        "source": source,
        "destination": str(destination),
        "to": to,
        "model_type": model_type if to == "hf" else None,
        "source_dtypes": list(plan.source_dtypes),
        "dtype": plan.dtype,
        "quantization": quantize,
        "tensors": tensors,
        "tensor_bytes": plan.tensor_bytes,
        "needed_bytes": conversion.needed_bytes,
        "files": {file.name: file.size for file in plan.files},
        "small_files": sorted(conversion.small_files),
        "destination_state": state,
    }
    if not as_json:
        console.print(
            f"from  {one_line(source)}: {tensors} tensors, {dtypes}{rounded}, {plan.tensor_bytes / 1e9:,.2f} GB"
        )
        console.print(
            f"to    {one_line(str(destination))}: {len(plan.files)} × *.safetensors, --max-shard-size {max_shard_size}"
        )
        if state != "new":
            console.print(f"which is {STATES[state]}")
    if dry_run:
        report["result"] = "planned"
        if not as_json:
            console.print("The source is complete and the destination has room; nothing was written.")
    else:
        started = time.monotonic()
        with progress_bar("converting", plan.tensor_bytes, console) as advance:
            is_new = conversion.run(jobs=jobs, progress=advance)
        seconds = time.monotonic() - started
        report |= {"result": "converted" if is_new else "complete", "seconds": round(seconds, 3)}
        if not as_json:
            rate = f"in {seconds:,.1f} s, {plan.tensor_bytes / 1e6 / seconds:,.0f} MB/s"
            if is_new:
                console.print(f"done  {rate}, all checks passed")
            else:
                console.print(f"complete: compared {rate}, every tensor is what the source gives; nothing was written")
            console.print("\nTry it:\n")
            snippet = SNIPPETS[to, model_type].format(folder=str(destination))
            console.print(f"python -c {shlex.quote(snippet)}")
    if as_json:
        print_json(report)
