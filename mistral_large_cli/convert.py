"""Printing of `mistral-large convert`: the plan, the progress, and what to do with the result."""

import shlex
import time
from pathlib import Path

SNIPPET = """\
import modeling_mistral_large
from transformers import pipeline
chat = pipeline("text-generation", {folder!r}, dtype="auto", device_map="auto")
answer = chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)
print(answer[0]["generated_text"][-1]["content"])"""


def convert(source: Path, destination: Path, max_shard_size: str, dry_run: bool) -> None:
    """Convert `source` into `destination` and say so; with `dry_run` only check and print the plan.

    Raises:
        MistralLargeError: the reasons of `convert_checkpoint`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from modeling_mistral_large.conversion import check_destination, convert_checkpoint, plan_conversion

    console = Console(highlight=False, markup=False, soft_wrap=True)

    plan = plan_conversion(source, max_shard_size=max_shard_size)
    check_destination(source, destination, plan.file_bytes)
    tensors = sum(len(file.tensors) for file in plan.files)
    console.print(f"from  {source}: {tensors} tensors, {plan.dtype}, {plan.tensor_bytes / 1e9:,.2f} GB")
    console.print(f"to    {destination}: {len(plan.files)} × *.safetensors, --max-shard-size {max_shard_size}")
    if dry_run:
        console.print("The source is complete and the destination has room; nothing was written.")
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    started = time.monotonic()
    # A bar that is redrawn makes no sense in a file or a pipe.
    with Progress(TextColumn("converting"), *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=plan.tensor_bytes)
        convert_checkpoint(
            source, destination, max_shard_size=max_shard_size, progress=lambda count: bar.advance(task, count)
        )
    seconds = time.monotonic() - started
    console.print(f"done  in {seconds:,.1f} s, {plan.tensor_bytes / 1e6 / seconds:,.0f} MB/s, all checks passed")
    console.print("\nTry it:\n")
    console.print(f"python -c {shlex.quote(SNIPPET.format(folder=str(destination)))}")
