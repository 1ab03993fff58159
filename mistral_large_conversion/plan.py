"""What a conversion will read and write, decided from file headers before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import split_state_dict_into_shards_factory

from mistral_large_conversion.checkpoint.adapter import Adapter, read_adapter
from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.geometry import Geometry, ModelSizes
from mistral_large_conversion.checkpoint.hub import resolve_adapter
from mistral_large_conversion.checkpoint.layout import OTHER_LAYOUT, WEIGHTS_STEM, Layout, source_layout
from mistral_large_conversion.checkpoint.names import expected_tensors, is_buffer, unwrapped_name
from mistral_large_conversion.checkpoint.params import geometry_from_params
from mistral_large_conversion.checkpoint.quantization import (
    CANNOT_UNDO,
    FORMATS,
    Quantization,
    Scheme,
    choose_group_size,
    fused_weights,
    is_quantized,
    quantization_of,
    quantized_entries,
)
from mistral_large_conversion.checkpoint.read import (
    dtype_problems,
    expected_entries,
    params_of_config,
    read_checkpoint,
    refuse,
    tensor_problems,
)
from mistral_large_conversion.checkpoint.safetensors_header import (
    BYTES_OF,
    MemoryTensor,
    StoredTensor,
    TensorEntry,
    encode_header,
)
from mistral_large_conversion.errors import CheckpointError, SettingError
from mistral_large_conversion.global_scale import FusedWeights
from mistral_large_conversion.merge import merge_step
from mistral_large_conversion.options import check_option, parse_size
from mistral_large_conversion.planned_tensor import PlannedTensor
from mistral_large_conversion.quantize import MadeTensor, Quantize, shape_tensor
from mistral_large_conversion.transforms import Cast, RegroupRopePairs, Step

if TYPE_CHECKING:
    import torch

OutputDtype = Literal["bf16", "fp16", "fp32"]

OUTPUT_DTYPES: dict[OutputDtype, str] = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
DEFAULT_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class PlannedFile:
    """One file of weights to be written."""

    name: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def outputs(self) -> tuple[TensorEntry, ...]:
        """What the file will hold, in the order of its bytes."""
        return tuple(output for tensor in self.tensors for output in tensor.outputs)

    @property
    def header(self) -> bytes:
        return encode_header(self.outputs)

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.size for tensor in self.tensors)

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Offset and size of each output in the file, in bytes."""
        start, places = len(self.header), {}
        for output in self.outputs:
            places[output.name] = (start, output.size)
            start += output.size
        return places


@dataclass(frozen=True)
class ConversionPlan:
    """All that moving the weights needs to know.

    to: the layout that is written.
    quantization: how the weights will be quantized, or None.
    adapter: the LoRA that is merged into the weights, or None.
    calibration: what the codes and scales are chosen by; None where each weight is rounded to the nearest.
    dtype, source_dtypes: what is written, and what there is; quantized weights are of other dtypes.
    """

    to: Layout
    geometry: Geometry
    dtype: str
    source_dtypes: tuple[str, ...]
    files: tuple[PlannedFile, ...]
    quantization: Quantization | None = None
    adapter: Adapter | None = None
    calibration: Calibration | None = None

    def is_calibrated(self, tensor: PlannedTensor) -> bool:
        """Whether the outputs of a tensor take more than its source to be made: the activations that reach it."""
        return self.calibration is not None and tensor.quantize is not None

    @property
    def cast(self) -> tuple[str, str] | None:
        """The dtypes of the source and of the output where they differ."""
        return None if self.source_dtypes == (self.dtype,) else (", ".join(self.source_dtypes), self.dtype)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors to be written, without headers."""
        return sum(tensor.size for file in self.files for tensor in file.tensors)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files of weights."""
        return sum(file.size for file in self.files)

    @property
    def index_name(self) -> str:
        return f"{WEIGHTS_STEM[self.to]}.safetensors.index.json"

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of the index, or None for a single file, which needs none."""
        if len(self.files) == 1:
            return None
        weight_map = {output.name: file.name for file in self.files for output in file.outputs}
        return {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def plan_conversion(
    source: Path | str,
    *,
    to: Layout = "hf",
    dtype: OutputDtype | None = None,
    quantize: Scheme | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    adapter: Path | str | None = None,
    calibration: Calibration | None = None,
) -> ConversionPlan:
    """Plan the way of a checkpoint to layout `to`, from the headers of the folder `source`.

    Only the files of one layout are looked at: to the HF layout, the vendor's where there is one, and the second copy
    of the weights in the vendor's folder is ignored. `dtype` is that of the output; without it, the source must have
    one, which stays. `adapter` is a LoRA that is merged into the weights, see `read_adapter`. `calibration` says what
    int4 weights are calibrated with.

    Raises:
        CheckpointError: everything that is missing, extra, damaged or of another shape than the geometry says, in one
            error; options that do not fit together.
    """
    check_option("to", to, OTHER_LAYOUT)
    check_option("dtype", dtype, (None, *OUTPUT_DTYPES))
    check_option("quantize", quantize, (None, *FORMATS))
    if calibration is not None and quantize != "int4":
        raise SettingError(
            f"calibration with quantize {quantize!r}: only int4 is calibrated; pass quantize='int4' or leave it out"
        )
    layout = layout_to_read(source, to=to, quantize=quantize)
    if quantize is not None:
        if to != "hf":
            raise CheckpointError(f"quantizing to {quantize}: only the HF layout has a place for it; leave `to` out")
        if dtype is not None:
            raise CheckpointError(
                f"quantizing to {quantize}: what is not quantized is bf16, with dtype {dtype} too; leave `dtype` out"
            )
        dtype = "bf16"
    checkpoint = read_checkpoint(
        source, layout, needs_tokenizer=layout == "consolidated", may_mix_dtypes=dtype is not None
    )
    geometry, quantization = checkpoint.geometry, None
    if quantize is not None:
        shapes = [tensor.shape for tensor in expected_tensors(geometry) if is_quantized(tensor.hf)]
        quantization = Quantization(quantize, choose_group_size(shapes, quantize))
    lora = None if adapter is None else open_adapter(adapter, geometry)
    plan = _plan(checkpoint.tensors, geometry, layout, to, dtype, max_shard_size, quantization, lora)
    return replace(plan, calibration=calibration)


def open_adapter(adapter: Path | str, geometry: Geometry) -> Adapter:
    """The adapter in a folder or hub repository, for a base of this geometry; see `read_adapter`."""
    folder, name = resolve_adapter(adapter)
    return read_adapter(folder, geometry, name=name)


def layout_to_read(source: Path | str, *, to: Layout, quantize: Scheme | None) -> Layout:
    """The layout that is converted: to the consolidated one the other, else that of the source."""
    return "hf" if to == "consolidated" and quantize is None else source_layout(source)


def plan_export(
    state_dict: Mapping[str, "torch.Tensor"],
    config: Mapping[str, Any],
    *,
    dtype: OutputDtype | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
) -> ConversionPlan:
    """Plan the way of a state dict in memory, under HF names, to the consolidated layout.

    config: what its config.json would say, of ours or of transformers' Mistral.

    Raises:
        CheckpointError: as for `plan_conversion`.
    """
    check_option("dtype", dtype, (None, *OUTPUT_DTYPES))
    if quantization_of(config.get("quantization_config")) is not None:
        raise CheckpointError(f"the model: {CANNOT_UNDO}")
    tensors = [MemoryTensor.of(unwrapped_name(name), tensor) for name, tensor in state_dict.items()]
    tensors = [tensor for tensor in tensors if not is_buffer(tensor.name)]
    params, problems = params_of_config(config, tensors)
    listed = [f"config: {problem}" for problem in problems]
    refuse(listed, "the config is not that of a Mistral Large", remedy="pass the model's own")
    geometry = geometry_from_params(params)
    problems = tensor_problems(tensors, expected_entries(geometry, "hf"), are_complete=True)
    problems += [
        f"tensor {tensor.name!r} is on device meta, without data; load the model without offload"
        for tensor in tensors
        if tensor.tensor.is_meta
    ]
    if dtype is None:
        problems += dtype_problems(tensors)
    refuse(problems, "the state dict does not fit its config", remedy="correct one of the two")
    return _plan({tensor.name: tensor for tensor in tensors}, geometry, "hf", "consolidated", dtype, max_shard_size)


def planned_tensors(
    stored: Mapping[str, StoredTensor],
    geometry: ModelSizes,
    layout: Layout,
    to: Layout,
    dtype: str,
    quantization: Quantization | None = None,
    adapter: Adapter | None = None,
) -> list[PlannedTensor]:
    """The way of each tensor of a checkpoint of `layout` to layout `to`, in the order of the forward pass.

    dtype: of what is not quantized, as safetensors names it.
    """
    planned = []
    fused: dict[tuple[str, ...], FusedWeights] = {}
    for expected in expected_tensors(geometry):
        source, name = stored[getattr(expected, layout)], getattr(expected, to)
        has_codes = quantization is not None and is_quantized(name)
        own_dtype = source.dtype if has_codes else dtype
        merge = None if adapter is None else merge_step(adapter, expected.hf, source, own_dtype)
        steps: list[Step] = [] if source.dtype == own_dtype else [Cast(source.dtype, own_dtype)]
        if merge is None:
            steps += [RegroupRopePairs(to, geometry.head_dim)] if expected.has_rope_pairs and layout != to else []
        else:
            # An adapter has its rows in HF order.
            pairs, head_dim = expected.has_rope_pairs, geometry.head_dim
            before = [RegroupRopePairs("hf", head_dim)] if pairs and layout == "consolidated" else []
            after = [RegroupRopePairs("consolidated", head_dim)] if pairs and to == "consolidated" else []
            steps += [*before, merge, *after]
        if has_codes and quantization is not None:
            codes, scales, *others = quantized_entries(name, expected.shape, *quantization)
            quantize = Quantize(source.dtype, *quantization)
            tensor = PlannedTensor(source, tuple(steps), (codes, scales), quantize)
            made: list[MadeTensor]
            if quantization.scheme == "nvfp4":
                weights = fused.setdefault(fused_weights(name), FusedWeights())
                made = [weights.add(tensor, entry) for entry in others]
                # It is read when the tensor begins.
                tensor = replace(tensor, quantize=replace(quantize, global_scale=made[0]))
            else:
                made = [shape_tensor(entry, expected.shape) for entry in others]
            planned += [tensor, *(PlannedTensor(each, (), (entry,)) for each, entry in zip(made, others, strict=True))]
            continue
        size = source.size // BYTES_OF[source.dtype] * BYTES_OF[dtype]
        planned.append(PlannedTensor(source, tuple(steps), (TensorEntry(name, dtype, source.shape, size),)))
    return planned


def _plan(
    tensors: Mapping[str, StoredTensor],
    geometry: Geometry,
    layout: Layout,
    to: Layout,
    dtype: OutputDtype | None,
    max_shard_size: int | str,
    quantization: Quantization | None = None,
    adapter: Adapter | None = None,
) -> ConversionPlan:
    written_dtype = next(iter(tensors.values())).dtype if dtype is None else OUTPUT_DTYPES[dtype]
    planned = {
        tensor.outputs[0].name: tensor
        for tensor in planned_tensors(tensors, geometry, layout, to, written_dtype, quantization, adapter)
    }
    split = split_state_dict_into_shards_factory(
        {name: tensor.size for name, tensor in planned.items()},
        get_storage_size=int,
        filename_pattern=WEIGHTS_STEM[to] + "{suffix}.safetensors",
        max_shard_size=parse_size(max_shard_size),
    )
    files = tuple(
        PlannedFile(file, tuple(planned[name] for name in names)) for file, names in split.filename_to_tensors.items()
    )
    source_dtypes = tuple(sorted({tensor.dtype for tensor in tensors.values()}))
    return ConversionPlan(
        to=to,
        geometry=geometry,
        quantization=quantization,
        adapter=adapter,
        dtype=written_dtype,
        source_dtypes=source_dtypes,
        files=files,
    )
