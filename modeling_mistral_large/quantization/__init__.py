"""Linear layers that stay quantized in memory, and how models with them are loaded and saved."""

from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear, QuantizedLinear
from modeling_mistral_large.quantization.loading import quantize_modules_, use_kernels_
from modeling_mistral_large.quantization.nvfp4 import Nvfp4Linear

__all__ = ["Fp8Linear", "Int4Linear", "Nvfp4Linear", "QuantizedLinear", "quantize_modules_", "use_kernels_"]
