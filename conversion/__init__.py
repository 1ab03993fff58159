"""Conversion between the vendor's consolidated layout and the HF layout; see `convert_checkpoint`."""

from modeling_mistral_large.conversion.convert import convert_checkpoint, export_checkpoint
from modeling_mistral_large.conversion.destination import check_destination
from modeling_mistral_large.conversion.plan import ConversionPlan, plan_conversion

__all__ = ["ConversionPlan", "check_destination", "convert_checkpoint", "export_checkpoint", "plan_conversion"]
