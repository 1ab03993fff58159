"""Conversion between the vendor's consolidated layout and the HF layout; see `convert_checkpoint`."""

from modeling_mistral_large.conversion.convert import (
    Conversion,
    convert_checkpoint,
    export_checkpoint,
    prepare_conversion,
)
from modeling_mistral_large.conversion.inspect import Inspection, inspect_checkpoint
from modeling_mistral_large.conversion.manifest import Manifest, ManifestFile, ManifestTensor, read_manifest
from modeling_mistral_large.conversion.plan import ConversionPlan, plan_conversion
from modeling_mistral_large.conversion.retag import retag_checkpoint
from modeling_mistral_large.conversion.verify import Check, verify_checkpoint

__all__ = [
    "Check",
    "Conversion",
    "ConversionPlan",
    "Inspection",
    "Manifest",
    "ManifestFile",
    "ManifestTensor",
    "convert_checkpoint",
    "export_checkpoint",
    "inspect_checkpoint",
    "plan_conversion",
    "prepare_conversion",
    "read_manifest",
    "retag_checkpoint",
    "verify_checkpoint",
]
