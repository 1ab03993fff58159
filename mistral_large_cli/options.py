"""Options that several commands have, each declared once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mistral_large_conversion.checkpoint.source_files import ADAPTER_CONFIG_NAME
from mistral_large_conversion.errors import SettingError

# Names of dtypes as people write them, and as `convert` and `plan` have them.
DTYPES: dict[str, Literal["bf16", "fp16", "fp32"]] = {
    "bf16": "bf16",
    "bfloat16": "bf16",
    "fp16": "fp16",
    "float16": "fp16",
    "fp32": "fp32",
    "float32": "fp32",
}
# The same as torch names them.
TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Dtype = Literal["bf16", "bfloat16", "fp16", "float16", "fp32", "float32"]

Model = Annotated[str, typer.Argument(help="Folder of either layout, or repository on the hub (owner/name).")]
Source = Annotated[str, typer.Argument(help="Folder with a checkpoint, or repository on the hub (owner/name).")]

Adapter = Annotated[
    str | None,
    typer.Option(help="LoRA to load: folder or repository, in PEFT's format or with the vendor's lora.safetensors."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a repository on the hub.")]
Token = Annotated[
    str | None, typer.Option(help="Access token for the hub; HF_TOKEN hides it from other users of the machine.")
]
CacheDir = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder for downloads instead of the usual cache.")
]

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else.")]
Kv = Annotated[Literal["auto", "fp8"], typer.Option(help="KV-cache dtype: the model's, or FP8.")]
PrefillChunk = Annotated[int, typer.Option(min=1, help="Prefill chunk size in tokens.")]
PromptFormat = Annotated[
    Literal["v3", "v7", "own"] | None,
    typer.Option(
        help="Prompt format of a fine-tune; own: its chat template.", show_default="what its chat template renders"
    ),
]
HtmlFile = Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the output as an HTML page.")]
SvgFile = Annotated[Path | None, typer.Option(dir_okay=False, help="Also write the output as a picture.")]


def hub_options(
    source: str | None, revision: str | None, token: str | None, cache_dir: Path | None, *, draft: str | None = None
) -> dict[str, Any]:
    """Return those of the three that are given, as `resolve_source` and `from_pretrained` take them.

    source: what is read, or None where nothing is.
    draft: what is read, too, at a revision of its own.

    Raises:
        SettingError: one is given, and nothing is read from the hub.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in {"revision": revision, "token": token, "cache_dir": cache_dir}.items()
        if value is not None
    }
    without_effect = {*given}
    if source is not None:
        if not Path(source).exists():
            return given
        if (Path(source) / ADAPTER_CONFIG_NAME).exists():
            # The adapter's base may be on the hub, at a revision that the adapter names.
            without_effect &= {"revision"}
    if draft is not None and not Path(draft).exists():
        without_effect &= {"revision"}
    if without_effect:
        option = f"--{sorted(without_effect)[0].replace('_', '-')}"
        what = "no repository on the hub is read" if source is None else f"{source} is a folder here"
        raise SettingError(f"{option}: has no effect: {what}; leave it out, or name a repository as owner/name")
    return given
