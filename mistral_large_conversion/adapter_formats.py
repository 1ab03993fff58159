"""Conversion of LoRA adapters between PEFT's format and the vendor's lora.safetensors, value for value."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, nextafter
from pathlib import Path
from typing import Any

import numpy

from mistral_large_conversion.checkpoint.adapter import (
    DOWN,
    PEFT_PREFIX,
    UP,
    Adapter,
    linear_layers,
    read_adapter,
    read_bytes,
)
from mistral_large_conversion.checkpoint.adapter_folder import FILES, adapter_layout
from mistral_large_conversion.checkpoint.atomic_write import atomic_write, json_bytes, write_file
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.checkpoint.hub import resolve_adapter, resolve_source
from mistral_large_conversion.checkpoint.layout import CONFIG_NAMES, OTHER_LAYOUT, Layout, layouts_of
from mistral_large_conversion.checkpoint.params import params_from_geometry
from mistral_large_conversion.checkpoint.read import read_geometry, refuse
from mistral_large_conversion.checkpoint.safetensors_header import (
    BYTES_OF,
    METADATA,
    FileTensor,
    TensorEntry,
    encode_header,
)
from mistral_large_conversion.checkpoint.source_files import file_problem, read_adapter_base, shown
from mistral_large_conversion.destination import check_destination, new_folder
from mistral_large_conversion.errors import CheckpointError, DestinationError
from mistral_large_conversion.model_card import LICENCE_NAMES
from mistral_large_conversion.options import check_option
from mistral_large_conversion.plan import OUTPUT_DTYPES, OutputDtype
from mistral_large_conversion.transforms import Cast, RegroupRopePairs, Rows

# What adapter_config.json says of every adapter that is written.
PEFT_SETTINGS: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
# As PEFT and the vendor's code write their files.
METADATA_OF: dict[Layout, dict[str, str] | None] = {"hf": METADATA, "consolidated": None}


@dataclass(frozen=True)
class _Output:
    """A or B of one layer as it is written; of zeros without a source."""

    entry: TensorEntry
    source: FileTensor | None
    regroup: RegroupRopePairs | None

    def content(self) -> Rows:
        """The rows to be written."""
        rows: Rows
        if self.source is None:
            rows = numpy.zeros((self.entry.shape[0], self.entry.size // self.entry.shape[0]), numpy.uint8)
            return rows
        rows = numpy.frombuffer(read_bytes(self.source), numpy.uint8).reshape(self.source.shape[0], -1)
        if self.source.dtype != self.entry.dtype:
            try:
                rows = Cast(self.source.dtype, self.entry.dtype)(rows)
            except ValueError as error:
                raise CheckpointError(f"tensor {self.source.name!r} {error}") from error
        return rows if self.regroup is None else self.regroup(rows)


def convert_adapter(
    source: Path | str,
    destination: Path | str,
    *,
    to: Layout,
    base: Path | str | None = None,
    dtype: OutputDtype | None = None,
) -> Adapter:
    """Convert the LoRA adapter in `source`, a folder or a hub repository, to the other format in `destination`.

    Names become those of the other layout, and the rows of B of query and key are regrouped; without `dtype`, no value
    changes. The vendor's code needs LoRA on every linear layer of the decoder: zeros are written where there is none.

    to: `hf` for PEFT's format, `consolidated` for the vendor's lora.safetensors with its params.json.
    base: the checkpoint that the adapter is for. An adapter of PEFT names it, unless it has moved; the vendor's does
        not, and without it nor will what is written.
    dtype: rounds the values to another one. PEFT saves float32, mistral-inference takes the dtype of the base only.

    Returns: the adapter that was written.

    Raises:
        CheckpointError: an adapter that cannot be read, is of that format already, or has no place in it.
        DestinationError: a folder that is neither new nor empty, or cannot be written.
    """
    check_option("to", to, OTHER_LAYOUT)
    check_option("dtype", dtype, (None, *OUTPUT_DTYPES))
    folder, name = resolve_adapter(source)
    layout = adapter_layout(folder)
    if layout == to:
        raise CheckpointError(
            f"{source}: an adapter in {FILES[to][1]} already, which is layout {to}; use it unchanged, or convert it to "
            f"{OTHER_LAYOUT[to]}"
        )
    base_to_read = base or (read_adapter_base(folder) if layout == "hf" else None)
    # The vendor's format has the geometry; a base that is on the hub, or nowhere yet, is only named.
    is_needed = layout == "hf" or (base_to_read is not None and Path(base_to_read).is_dir())
    geometry = _geometry_of(base_to_read) if is_needed and base_to_read is not None else None
    adapter = read_adapter(folder, geometry, name=name)
    settings = _peft_settings(adapter, base) if to == "hf" else _vendors_settings(adapter)
    outputs = sorted(
        _outputs(adapter, to, None if dtype is None else OUTPUT_DTYPES[dtype]),
        # The order in which the library safetensors writes.
        key=lambda output: (-BYTES_OF[output.entry.dtype], output.entry.name),
    )
    target = Path(destination)
    header = encode_header([output.entry for output in outputs], METADATA_OF[to])
    needed_bytes = len(header) + sum(output.entry.size for output in outputs)
    if check_destination(folder, target, needed_bytes) != "new":
        raise DestinationError(f"{target}: holds a conversion of a checkpoint; choose a new or empty folder")
    settings_name, weights_name = FILES[to]
    try:
        with new_folder(target) as partial:
            with atomic_write(partial / weights_name) as stream:
                stream.write(header)
                for output in outputs:
                    stream.write(output.content().data)
            for licence in LICENCE_NAMES:
                if (folder / licence).exists() and file_problem(folder, licence) is None:
                    write_file(partial / licence, (folder / licence).read_bytes())
            write_file(partial / settings_name, json_bytes(settings))
    except OSError as error:
        if isinstance(error, DestinationError):
            raise
        raise DestinationError(f"{target}: cannot be written: {error}; fix that and run it again") from error
    return read_adapter(target, adapter.geometry)


def _geometry_of(base: Path | str) -> Geometry:
    """The geometry of a folder or hub repository, of which only the settings are read."""
    try:
        folder = resolve_source(base, patterns=tuple(CONFIG_NAMES.values()))
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter: {error}; name it as `base` where it has moved") from error
    layouts = layouts_of(folder)
    if not layouts:
        raise CheckpointError(
            f"{base}: the base of the adapter, without {' or '.join(CONFIG_NAMES.values())}, which say its sizes; name "
            "it as `base` where it has moved"
        )
    return read_geometry(folder, layouts[0])[0]


def _peft_settings(adapter: Adapter, base: Path | str | None) -> dict[str, Any]:
    (rank,), (scaling,) = adapter.ranks, adapter.scalings
    product = scaling * rank
    # Not every number is a quotient by the rank. The nearest one is the same in float32, in which LoRA is scaled.
    near = (product, nextafter(product, inf), nextafter(product, -inf))
    alpha = min(near, key=lambda each: abs(each / rank - scaling))
    modules = {hf.removesuffix(".weight").rsplit(".", 1)[-1] for hf in adapter.pairs}
    return {
        **PEFT_SETTINGS,
        "base_model_name_or_path": None if base is None else os.fspath(base),
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": adapter.dropout,
        "r": rank,
        "target_modules": sorted(modules),
    }


def _vendors_settings(adapter: Adapter) -> dict[str, Any]:
    problems = []
    for what, values in (("ranks", adapter.ranks), ("scalings", adapter.scalings)):
        if len(values) > 1:
            problems.append(f"{what} {', '.join(map(str, values))}: params.json has a place for one")
    if (scaling := adapter.scalings[0]) <= 0:
        problems.append(f"scaling {scaling}: must be greater than 0")
    problems += [
        f"LoRA of {shown(hf)}: the vendor's code has none outside of the layers"
        for hf, _, layer, _ in linear_layers(adapter.geometry)
        if layer is None and hf in adapter.pairs
    ]
    what = f"{adapter.folder} has no place in the vendor's format"
    refuse(problems, what, remedy="keep the adapter as PEFT has it, or merge it into its base")
    lora = {"enable": True, "rank": adapter.ranks[0], "dropout": adapter.dropout, "scaling": scaling}
    return {**params_from_geometry(adapter.geometry), "lora": lora}


def _outputs(adapter: Adapter, to: Layout, dtype: str | None) -> Iterator[_Output]:
    """The tensors of an adapter in the other format."""
    (rank,) = adapter.ranks
    dtypes = {tensor.dtype for pair in adapter.pairs.values() for tensor in (pair.down, pair.up)}
    if dtype is None and len(dtypes) > 1:
        raise CheckpointError(
            f"{adapter.folder}: tensors of dtypes {', '.join(sorted(dtypes))}: an adapter has one; ask for a dtype to "
            "have them converted"
        )
    written = dtype or dtypes.pop()
    for hf, (rows, columns), layer, (consolidated, has_rope_pairs) in linear_layers(adapter.geometry):
        if layer is None:
            continue
        pair = adapter.pairs.get(hf)
        stem = (f"{PEFT_PREFIX}{hf}" if to == "hf" else consolidated).removesuffix(".weight")
        regroup = RegroupRopePairs(to, adapter.geometry.head_dim) if has_rope_pairs else None
        for end, shape, source in (
            (DOWN, (rank, columns), None if pair is None else pair.down),
            (UP, (rows, rank), None if pair is None else pair.up),
        ):
            entry = TensorEntry(f"{stem}.{end}", written, shape, shape[0] * shape[1] * BYTES_OF[written])
            yield _Output(entry, source, regroup if end == UP else None)
