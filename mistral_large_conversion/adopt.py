"""A folder of our model type on the weights of another one: small files are written, weights are linked.

What a link is, in this order: a clone, where the file system shares the bytes of two files until one is changed; a hard
link, which stays when the other name is removed, as a hub cache does when it is pruned; a symbolic link, for another
file system, which does not. No act of this package writes into a file that is there: each puts a new one in its place.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mistral_large_conversion.checkpoint.adapter_folder import ADAPTER_MARKS, adapter_layout
from mistral_large_conversion.checkpoint.atomic_write import json_bytes, write_file
from mistral_large_conversion.checkpoint.hub import HF_FILES, resolve_source
from mistral_large_conversion.checkpoint.layout import TOKENIZER_JSON_NAME, WEIGHTS_STEM, layouts_of
from mistral_large_conversion.checkpoint.names import unwrapped_name
from mistral_large_conversion.checkpoint.read import Checkpoint, load_headers
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor, read_header
from mistral_large_conversion.destination import check_destination, new_folder
from mistral_large_conversion.errors import CheckpointError, DestinationError
from mistral_large_conversion.folder_tokenizer import FolderTokenizer, PromptFormat, read_folder_tokenizer
from mistral_large_conversion.hf_files import hf_files
from mistral_large_conversion.manifest import MANIFEST_NAME, Manifest, ManifestFile, ManifestTensor
from mistral_large_conversion.vocabulary import VOCABULARY_NAMES

Link = Literal["clone", "hard link", "symbolic link"]
# The request of Linux that makes a file share the bytes of another.
_FICLONE = 0x40049409
_CONVERT = "its bytes would have to change, which `mistral-large convert` does"


@dataclass(frozen=True)
class Adoption:
    """What was written.

    links: files by kind of link.
    written_bytes: of the small files.
    remarks: what of the source is not exact, or not taken, one line each.
    """

    destination: Path
    links: dict[Link, int]
    written_bytes: int
    prompt_format: str | None
    format_reason: str
    remarks: tuple[str, ...]


def adopt_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    prompt_format: PromptFormat | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: Path | str | None = None,
) -> Adoption:
    """Make a folder of our model type on the weights of a folder of the HF layout, without a copy of them.

    Tokenizer, config, template, model card, licence, index and manifest are written; the source is only read.

    source: a folder, a snapshot of the hub's cache, or a repository on the hub.
    prompt_format: "v3", "v7" or "own", instead of what the chat template renders.

    Raises:
        CheckpointError: a source that is not sound, or whose weights would have to change.
        TokenizerFileError: a tokenizer that cannot be read.
        DestinationError: a destination that is neither new nor empty, or cannot be written.
    """
    folder = resolve_source(source, patterns=HF_FILES, revision=revision, token=token, cache_dir=cache_dir)
    destination = Path(destination)
    checkpoint = _read(folder)
    # Before the tokenizer is made, which takes a second.
    if check_destination(folder, destination, 0) != "new":
        raise DestinationError(f"{destination}: holds another conversion; choose a new or empty folder")
    tokenizer = read_folder_tokenizer(folder, layout="hf", prompt_format=prompt_format)
    small_files = _small_files(checkpoint, tokenizer)
    written_bytes = sum(map(len, small_files.values()))
    check_destination(folder, destination, written_bytes)
    try:
        with new_folder(destination) as partial:
            links = _write(partial, checkpoint, tokenizer, small_files)
    except OSError as error:
        raise DestinationError(f"{destination}: not written: {error}; when that is fixed, run it again") from error
    return Adoption(
        destination,
        dict(Counter(links.values())),
        written_bytes,
        tokenizer.prompt_format,
        tokenizer.format_reason,
        tokenizer.remarks,
    )


def _read(folder: Path) -> Checkpoint:
    """The checkpoint whose files can be used unchanged.

    Raises:
        CheckpointError: the reasons of `read_checkpoint`, another layout, or names that no loader finds.
    """
    if "hf" not in layouts_of(folder):
        raise CheckpointError(f"{folder}: no weights in the HF layout to link; {_CONVERT}")
    if layout := adapter_layout(folder):
        raise CheckpointError(
            f"{folder}: holds an adapter next to the checkpoint, which would be left out; merge it with `mistral-large "
            f"convert --adapter`, or move {ADAPTER_MARKS[layout]} elsewhere"
        )
    try:
        checkpoint = load_headers(folder, "hf")
    except CheckpointError as error:
        if "ask for a dtype" in str(error):
            raise CheckpointError(f"{error}\n  weights are linked, not converted: {_CONVERT} with --dtype") from None
        raise
    for tensor in _stored(checkpoint):
        if unwrapped_name(tensor.name) != tensor.name:
            raise CheckpointError(
                f"{folder}: tensor {tensor.name!r} has the name of a wrapper in its name, from torch.compile or a "
                f"trainer: {_CONVERT}"
            )
    return checkpoint


def _small_files(checkpoint: Checkpoint, tokenizer: FolderTokenizer) -> dict[str, bytes]:
    folder = checkpoint.folder
    files = hf_files(
        checkpoint.geometry,
        quantization=checkpoint.quantization,
        dtype=checkpoint.dtype,
        model_type="mistral_large",
        source=folder,
        keeps_settings=True,
        tokenizer=tokenizer,
    )
    if tokenizer.vocabulary is not None:
        # On one line, a third of the bytes. A SentencePiece file is linked if there is one: nothing of ours needs it.
        files[TOKENIZER_JSON_NAME] = tokenizer.backend.to_str().encode()
        files = {name: content for name, content in files.items() if name not in VOCABULARY_NAMES}
    index_name = f"{WEIGHTS_STEM['hf']}.safetensors.index.json"
    names = {path.name for path in _weight_files(checkpoint)}
    if len(names) > 1:
        weight_map = {tensor.name: tensor.path.name for tensor in _stored(checkpoint)}
        total = sum(tensor.size for tensor in _stored(checkpoint))
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        files[index_name] = json_bytes(index)
    return files


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return list({tensor.path: None for tensor in checkpoint.tensors.values()})


def _stored(checkpoint: Checkpoint) -> list[FileTensor]:
    """All tensors of the files, buffers as well."""
    return [tensor for path in _weight_files(checkpoint) for tensor in read_header(path)[0]]


def _write(
    folder: Path, checkpoint: Checkpoint, tokenizer: FolderTokenizer, small_files: dict[str, bytes]
) -> dict[str, Link]:
    """Fill a folder that no one else uses; returns the kind of link of each file of weights."""
    for name, content in small_files.items():
        write_file(folder / name, content)
    files = {name: ManifestFile.of(content) for name, content in small_files.items()}
    if tokenizer.model_file is not None and tokenizer.vocabulary is not None:
        name = next(each for each in VOCABULARY_NAMES if each.endswith(tokenizer.vocabulary))
        # Small: copied where it would be a symbolic link.
        if _link(checkpoint.folder / tokenizer.model_file, folder / name) == "symbolic link":
            write_file(folder / name, tokenizer.sentencepiece)
        files[name] = ManifestFile.of(tokenizer.sentencepiece)
    kinds: dict[str, Link] = {}
    for path in _weight_files(checkpoint):
        kinds[path.name] = _link(path, folder / path.name)
        files[path.name] = ManifestFile.of_file(folder / path.name)
    manifest = Manifest(
        {
            name: ManifestTensor(tensor.path.name, tensor.dtype, tensor.shape, None)
            for name, tensor in checkpoint.tensors.items()
        },
        dict(sorted(files.items())),
        links={name: str((folder / name).resolve()) for name, kind in kinds.items() if kind == "symbolic link"},
    )
    write_file(folder / MANIFEST_NAME, json_bytes(manifest.to_json()))
    return kinds


def _link(source: Path, destination: Path) -> Link:
    """Make a file with the bytes of another, without a copy of them; see above for the order."""
    source = source.resolve(strict=True)
    if _clone(source, destination):
        return "clone"
    try:
        os.link(source, destination)
    # Another file system, one without links, or a file of someone else.
    except OSError:
        destination.symlink_to(source)
        return "symbolic link"
    return "hard link"


def _clone(source: Path, destination: Path) -> bool:
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with source.open("rb") as origin, destination.open("xb") as copy:
            fcntl.ioctl(copy.fileno(), _FICLONE, origin.fileno())
    except OSError:
        destination.unlink(missing_ok=True)
        return False
    return True
