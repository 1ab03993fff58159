"""What stands under the model: caches, attention, chunked prefill, products of few rows."""

from modeling_mistral_large.inference.cpu_decode import use_vector_products_
from modeling_mistral_large.inference.kv_cache import Fp8Cache

__all__ = ["Fp8Cache", "use_vector_products_"]
