"""`mistral-large adopt`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson, CacheDir, PromptFormat, Revision, Source, Token, hub_options
from .terminal import one_line, print_json


def adopt(
    source: Source,
    destination: Annotated[Path, typer.Argument(file_okay=False, help="Folder to write, new or empty.")],
    prompt_format: PromptFormat = None,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Make a folder for this package on the weights of a folder of the HF layout, without a copy of them."""
    hub = hub_options(source, revision, token, cache_dir)
    from mistral_large_conversion import adopt_checkpoint

    done = adopt_checkpoint(source, destination, prompt_format=prompt_format, **hub)
    if as_json:
        print_json(asdict(done) | {"source": source, "destination": str(done.destination)})
        return
    links = ", ".join(f"{count} × {kind}" for kind, count in done.links.items())
    print(f"{one_line(str(destination))}: weights {links}; {done.written_bytes:,} bytes written")
    if "symbolic link" in done.links:
        print("note: symbolic links break when their targets are removed, as pruning of a cache does")
    print(one_line(f"prompts: {done.prompt_format or 'those of its own chat template'}; {done.format_reason}"))
    for remark in done.remarks:
        print(one_line(f"note: {remark}"))
