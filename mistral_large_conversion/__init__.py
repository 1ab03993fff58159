"""What a Mistral Large checkpoint is on disk, and the acts on it: convert, verify, inspect, retag, plan.

The vendor's consolidated layout and the HF layout, in both directions; see `convert_checkpoint`. Neither torch nor
transformers is imported, except by what rounds weights. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mistral_large_conversion.convert import (
        Conversion,
        convert_checkpoint,
        export_checkpoint,
        prepare_conversion,
    )
    from mistral_large_conversion.inspect import Inspection, inspect_checkpoint
    from mistral_large_conversion.manifest import Manifest, ManifestFile, ManifestTensor, read_manifest
    from mistral_large_conversion.plan import ConversionPlan, plan_conversion
    from mistral_large_conversion.retag import retag_checkpoint
    from mistral_large_conversion.verify import Check, verify_checkpoint

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
_MODULES = {
    "convert": ("Conversion", "convert_checkpoint", "export_checkpoint", "prepare_conversion"),
    "inspect": ("Inspection", "inspect_checkpoint"),
    "manifest": ("Manifest", "ManifestFile", "ManifestTensor", "read_manifest"),
    "plan": ("ConversionPlan", "plan_conversion"),
    "retag": ("retag_checkpoint",),
    "verify": ("Check", "verify_checkpoint"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
