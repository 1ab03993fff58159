"""Printing of `mistral-large convert`: the plan, the progress, and what to do with the result."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .marks import one_line
from .terminal import console as safe_console
from .terminal import print_json

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_large_conversion import Conversion
    from mistral_large_conversion.destination import State

CHAT = """\
from transformers import pipeline
chat = pipeline("text-generation", {folder!r}, dtype="auto", device_map="auto")
answer = chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)
print(answer[0]["generated_text"][-1]["content"])"""
# By layout and model type; the consolidated layout is read as it is.
SNIPPETS = {
    ("hf", "mistral_large"): f"import modeling_mistral_large\n{CHAT}",
    ("hf", "mistral"): CHAT,
    ("consolidated", "mistral_large"): """\
from modeling_mistral_large import MistralLargeForCausalLM
print(MistralLargeForCausalLM.from_pretrained({folder!r}, dtype="auto"))""",
}
STATES: dict["State", str] = {
    "new": "a new folder",
    "unfinished": "an interrupted conversion, to be continued",
    "finished": "a finished conversion, to be compared with the source",
}


def convert(
    source: str,
    destination: Path,
    *,
    to: Literal["consolidated", "hf"],
    model_type: Literal["mistral_large", "mistral"] | None,
    max_shard_size: str,
    dtype: Literal["bf16", "fp16", "fp32"] | None,
    quantize: Literal["fp8", "int4"] | None,
    jobs: int | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert `source` into `destination` and say so; with `dry_run` only check and print the plan.

    model_type: None for that of our classes.

    Raises:
        MistralLargeError: the reasons of `convert_checkpoint`, or an option without effect.
    """
    from mistral_large_conversion.errors import SettingError

    if to == "consolidated" and model_type is not None:
        raise SettingError(f"--as {model_type} with --to consolidated: that layout has no model type; leave it out")
    if dry_run and jobs is not None:
        raise SettingError(f"--jobs {jobs} with --dry-run: nothing is written; leave one out")
    model_type = model_type or "mistral_large"
    from mistral_large_conversion import prepare_conversion
    from mistral_large_conversion.quantize import ConstantTensor

    # With JSON, people read standard error.
    console = safe_console(soft_wrap=True, stderr=as_json)
    conversion = prepare_conversion(
        source,
        destination,
        to=to,
        model_type=model_type,
        dtype=dtype,
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
        is_new = _run(conversion, jobs, console)
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


def _run(conversion: "Conversion", jobs: int | None, console: "Console") -> bool:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # A bar that is redrawn makes no sense in a file or a pipe.
    with Progress(TextColumn("converting"), *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=conversion.plan.tensor_bytes)
        return conversion.run(jobs=jobs, progress=lambda count: bar.advance(task, count))
