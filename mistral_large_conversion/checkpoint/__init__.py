"""What a checkpoint is on disk, in both layouts."""

from mistral_large_conversion.checkpoint.geometry import Geometry, ModelSizes
from mistral_large_conversion.checkpoint.hub import resolve_source
from mistral_large_conversion.checkpoint.names import ExpectedTensor, expected_tensors
from mistral_large_conversion.checkpoint.open import open_checkpoint
from mistral_large_conversion.checkpoint.quantization import Quantization, quantization_config, quantization_of
from mistral_large_conversion.checkpoint.read import Checkpoint, load_headers, read_checkpoint, read_geometry

__all__ = [
    "Checkpoint",
    "ExpectedTensor",
    "Geometry",
    "ModelSizes",
    "Quantization",
    "expected_tensors",
    "load_headers",
    "open_checkpoint",
    "quantization_config",
    "quantization_of",
    "read_checkpoint",
    "read_geometry",
    "resolve_source",
]
