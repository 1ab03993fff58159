"""Calibrated int4: conversions whose codes are chosen by what they do to activations, one decoder layer in memory."""

from modeling_mistral_large.calibration.conversion import (
    DEFAULT_DATA,
    convert_calibrated,
    prepare_calibrated_conversion,
)

__all__ = ["DEFAULT_DATA", "convert_calibrated", "prepare_calibrated_conversion"]
