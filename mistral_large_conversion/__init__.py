"""What a Mistral Large checkpoint is on disk, and the acts on it: convert, adopt, verify, inspect, retag, plan.

The vendor's consolidated layout and the HF layout, in both directions; see `convert_checkpoint`. Neither torch nor
transformers is imported, except by what rounds weights. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_large_conversion.adapter_formats import convert_adapter
    from mistral_large_conversion.adopt import Adoption, adopt_checkpoint
    from mistral_large_conversion.convert import (
        Conversion,
        convert_checkpoint,
        export_checkpoint,
        prepare_conversion,
    )
    from mistral_large_conversion.folder_tokenizer import FolderTokenizer, read_folder_tokenizer
    from mistral_large_conversion.inspect import Inspection, inspect_checkpoint
    from mistral_large_conversion.manifest import Manifest, ManifestAdapter, ManifestFile, ManifestTensor, read_manifest
    from mistral_large_conversion.plan import ConversionPlan, plan_conversion
    from mistral_large_conversion.retag import retag_checkpoint
    from mistral_large_conversion.samples import Sample, read_samples
    from mistral_large_conversion.verify import Check, verify_checkpoint

__all__ = [
    "Adoption",
    "Check",
    "Conversion",
    "ConversionPlan",
    "FolderTokenizer",
    "Inspection",
    "Manifest",
    "ManifestAdapter",
    "ManifestFile",
    "ManifestTensor",
    "Sample",
    "adopt_checkpoint",
    "convert_adapter",
    "convert_checkpoint",
    "export_checkpoint",
    "inspect_checkpoint",
    "plan_conversion",
    "prepare_conversion",
    "read_folder_tokenizer",
    "read_manifest",
    "read_samples",
    "retag_checkpoint",
    "verify_checkpoint",
]
_MODULES = {
    "adapter_formats": ("convert_adapter",),
    "adopt": ("Adoption", "adopt_checkpoint"),
    "convert": ("Conversion", "convert_checkpoint", "export_checkpoint", "prepare_conversion"),
    "folder_tokenizer": ("FolderTokenizer", "read_folder_tokenizer"),
    "inspect": ("Inspection", "inspect_checkpoint"),
    "manifest": ("Manifest", "ManifestAdapter", "ManifestFile", "ManifestTensor", "read_manifest"),
    "plan": ("ConversionPlan", "plan_conversion"),
    "retag": ("retag_checkpoint",),
    "samples": ("Sample", "read_samples"),
    "verify": ("Check", "verify_checkpoint"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
