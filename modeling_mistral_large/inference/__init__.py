"""What the model runs on: caches, attention, chunked prefill, kernels for decoding."""

from modeling_mistral_large.inference.cpu_decode import use_vector_products_
from modeling_mistral_large.inference.kv_cache import Fp8Cache

__all__ = ["Fp8Cache", "use_vector_products_"]
