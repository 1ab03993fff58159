"""`mistral-large convert`: the plan, the progress, and what to do with the result."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mistral_large_conversion.checkpoint.source_files import adapter_problem
from mistral_large_conversion.errors import SettingError

from .convert_adapter import adapter_lines, adapter_report
from .options import DTYPES, AsJson, CacheDir, Dtype, PromptFormat, Revision, Source, Token, hub_options
from .terminal import console as safe_console
from .terminal import one_line, print_json, progress_bar

if TYPE_CHECKING:
    from mistral_large_conversion.destination import State

CHAT = """\
from transformers import pipeline
chat = pipeline("text-generation", {folder!r}, dtype="auto", device_map="auto")
response = chat([{{"role": "user", "content": "Who are you?"}}], max_new_tokens=64)
print(response[0]["generated_text"][-1]["content"])"""
DEFAULT_SHARD_SIZE = "5GB"
# By layout and model type; the consolidated layout is read unchanged.
SNIPPETS = {
    ("hf", "mistral_large"): f"import modeling_mistral_large\n{CHAT}",
    ("hf", "mistral"): CHAT,
    ("consolidated", "mistral_large"): """\
from modeling_mistral_large import MistralLargeForCausalLM
print(MistralLargeForCausalLM.from_pretrained({folder!r}, dtype="auto"))""",
}
COMPARED_CALIBRATED = "what the manifest says, and every one that is not calibrated what the source gives"
STATES: dict["State", str] = {
    "new": "a new folder",
    "unfinished": "an interrupted conversion, to be resumed",
    "finished": "a finished conversion, to be compared with the source",
}


def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(help="Folder to write, new or empty; with --to gguf, a new file.")],
    to: Annotated[
        Literal["hf", "consolidated", "gguf"], typer.Option(help="Layout to write, or a GGUF file for llama.cpp.")
    ] = "hf",
    as_: Annotated[
        Literal["mistral_large", "mistral"] | None,
        typer.Option(
            "--as",
            help="Model type of the HF layout. mistral: for engines without this package.",
            show_default="mistral_large",
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Largest size of an output file, such as 5GB.")
    ] = DEFAULT_SHARD_SIZE,
    dtype: Annotated[Dtype | None, typer.Option(help="Round the weights; without it, every bit is kept.")] = None,
    quantize: Annotated[
        Literal["fp8", "int4", "nvfp4"] | None,
        typer.Option(
            help="Quantize the linear layers to 8 or 4 bits; round to nearest, if no --calibration chooses the codes."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|default",
            help="Of int4: choose the codes by GPTQ on this data, one decoder layer in memory. JSON lines of "
            '{"messages": ...} or {"text": ...}, or plain text; default: conversations of this package.',
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Calibrate on the first sequences only.", show_default="all, 256 at most"),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a sequence to calibrate on.", show_default="2048"),
    ] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None,
        typer.Option(help="Where to calibrate.", show_default="the GPU where there is one"),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="Merge a LoRA bit for bit as PEFT does: folder or repository, of PEFT or with the vendor's "
            "lora.safetensors."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Base checkpoint of an adapter in SOURCE, if it does not name one."),
    ] = None,
    prompt_format: PromptFormat = None,
    gguf_type: Annotated[
        str | None,
        typer.Option(
            help="Of gguf: BF16, F16, F32, Q8_0, or a mixture of llama-quantize from Q2_K to Q6_K, such as Q4_K_M.",
            show_default="the dtype of the weights",
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Of gguf: a checkout of llama.cpp, whose tools are run."),
    ] = None,
    llama_quantize: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Of gguf: llama-quantize, or the folder that holds it.",
            show_default="as built in --llama-cpp, else on the PATH",
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads. The bytes are the same with any number.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the source and print the plan only.")] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint from the vendor's layout or that of transformers, a few megabytes in memory at a time.

    Run an interrupted conversion again to resume it; a finished one is compared with its source. An adapter as SOURCE
    is converted between PEFT's format (--to hf) and the vendor's lora.safetensors (--to consolidated). A GGUF file is
    written by llama.cpp's own tools, from the start if they are interrupted.
    """
    of_weights = {
        "--as": as_ is not None,
        "--max-shard-size": max_shard_size != DEFAULT_SHARD_SIZE,
        "--quantize": quantize is not None,
        "--calibration": calibration is not None,
        "--samples": samples is not None,
        "--length": length is not None,
        "--device": device is not None,
        "--jobs": jobs is not None,
    }
    if to == "gguf":
        from .convert_gguf import convert_gguf

        convert_gguf(
            source,
            destination,
            gguf_type=gguf_type,
            llama_cpp=llama_cpp,
            llama_quantize=llama_quantize,
            without_effect={**of_weights, "--base": base is not None},
            hub=hub_options(source, revision, token, cache_dir),
            dry_run=dry_run,
            as_json=as_json,
            dtype=None if dtype is None else DTYPES[dtype],
            adapter=adapter,
            prompt_format=prompt_format,
        )
        return
    of_gguf = {"--gguf-type": gguf_type, "--llama-cpp": llama_cpp, "--llama-quantize": llama_quantize}
    for option, value in of_gguf.items():
        if value is not None:
            raise SettingError(f"{option} {value}: has no effect without --to gguf, which it is for; leave it out")
    if Path(source).is_dir() and adapter_problem(Path(source)):
        from .convert_adapter import convert_adapter

        without_effect = {
            **of_weights,
            "--adapter": adapter is not None,
            "--dry-run": dry_run,
            **{f"--{name}": True for name in hub_options(base, revision, token, cache_dir)},
        }
        convert_adapter(source, destination, to, base, dtype, without_effect, as_json=as_json)
        return
    if base is not None:
        raise SettingError(f"--base {base}: has no effect: {source} is no adapter; leave it out")

    if to == "consolidated" and as_ is not None:
        raise SettingError(f"--as {as_} with --to consolidated: that layout has no model type; leave it out")
    if dry_run and jobs is not None:
        raise SettingError(f"--jobs {jobs} with --dry-run: nothing is written; leave one out")
    data_options: dict[str, Any] = {
        name: value
        for name, value in (("samples", samples), ("length", length), ("device", device))
        if value is not None
    }
    if calibration is None and data_options:
        name, value = next(iter(data_options.items()))
        raise SettingError(f"--{name} {value}: has no effect without --calibration, which it is for; leave it out")
    if calibration is not None and quantize != "int4":
        has = "without --quantize" if quantize is None else f"with --quantize {quantize}"
        raise SettingError(f"--calibration {calibration} {has}: only int4 is calibrated; add --quantize int4")
    model_type = as_ or "mistral_large"
    hub = hub_options(source, revision, token, cache_dir)
    from mistral_large_conversion import prepare_conversion
    from mistral_large_conversion.quantize import MadeTensor

    # With JSON, people read standard error.
    console = safe_console(soft_wrap=True, stderr=as_json)
    options: dict[str, Any] = {
        "model_type": model_type,
        "to": to,
        "dtype": None if dtype is None else DTYPES[dtype],
        "max_shard_size": max_shard_size,
        "adapter": adapter,
        "prompt_format": prompt_format,
        **hub,
    }
    if calibration is None:
        conversion = prepare_conversion(source, destination, quantize=quantize, **options)
    else:
        from modeling_mistral_large.calibration import prepare_calibrated_conversion

        conversion = prepare_calibrated_conversion(
            source, destination, calibration=calibration, **data_options, **options
        )
    state = conversion.check_destination()
    plan = conversion.plan
    tensors = sum(not isinstance(tensor.source, MadeTensor) for file in plan.files for tensor in file.tensors)
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
        "calibration": None if plan.calibration is None else plan.calibration.to_json(),
        "adapter": None if plan.adapter is None else adapter_report(plan.adapter),
        "tensors": tensors,
        "tensor_bytes": plan.tensor_bytes,
        "needed_bytes": conversion.needed_bytes,
        "files": {file.name: file.size for file in plan.files},
        "small_files": sorted(conversion.small_files),
        "destination_state": state,
        "remarks": list(conversion.remarks),
    }
    if not as_json:
        console.print(
            f"from  {one_line(source)}: {tensors} tensors, {dtypes}{rounded}, {plan.tensor_bytes / 1e9:,.2f} GB"
        )
        if plan.calibration is not None:
            console.print(f"by    {one_line(plan.calibration.description)}, on {plan.calibration.device}")
        if plan.adapter is not None:
            for line in adapter_lines(plan.adapter, source):
                console.print(line)
        console.print(
            f"to    {one_line(str(destination))}: {len(plan.files)} × *.safetensors, --max-shard-size {max_shard_size}"
        )
        for remark in conversion.remarks:
            console.print(f"note  {one_line(remark)}")
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
                are = "what the source gives" if plan.calibration is None else COMPARED_CALIBRATED
                console.print(f"complete: compared {rate}, every tensor is {are}; nothing was written")
            console.print("\nTry it:\n")
            snippet = SNIPPETS[to, model_type].format(folder=str(destination))
            console.print(f"python -c {shlex.quote(snippet)}")
    if as_json:
        print_json(report)
