"""The memory that a model takes on one device: weights and cache exactly, activations as they are measured.

Activations are those of transformers' sdpa attention, as the tests of the plan measure them. Quantized weights and an
8-bit cache are the library's own. Sizes are bytes.
"""

import math
from dataclasses import dataclass, replace

from mistral_large_conversion.checkpoint.geometry import ModelSizes
from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.checkpoint.quantization import (
    FORMATS,
    GROUP_SIZES,
    Scheme,
    choose_group_size,
    is_quantized,
)

GIB = 2**30
# Tokens of a prompt that `generate` reads at once.
PREFILL_CHUNK = 2048
# Weights dequantized at once where a product has no kernel: what stays in a processor's cache, and what keeps a
# GPU busy.
DEQUANTIZED_AT_ONCE = {"cpu": 2**22, "cuda": 2**27}


def run_time_bytes(shape: tuple[int, ...], scheme: Scheme, group_size: int | None = None) -> int:
    """Bytes in memory of a linear layer with a weight [out, in], once the model is loaded by our classes.

    fp8: a byte for each weight, and an FP32 scale for each row.
    int4: half a byte for each weight, and a BF16 scale and a BF16 zero for each group.
    nvfp4: half a byte for each weight, an FP8 scale for each group, and an FP32 one.
    """
    rows, columns = shape
    if scheme == "fp8":
        return rows * columns + rows * 4
    groups = rows * columns // (group_size or GROUP_SIZES[scheme][0])
    return rows * columns // 2 + (groups + 4 if scheme == "nvfp4" else groups * 4)


# Weights of a dtype, which activations and cache have too, and quantized ones, with activations in bf16.
BYTES_OF_NUMBER = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8": 2, "int4": 2, "nvfp4": 2}

QUANTIZED = tuple(FORMATS)

CACHES = ("auto", "fp8")

# Each vector of a head in an 8-bit cache has a scale.
SCALE_BYTES = 2

# Tensor parallelism cuts these along the features they read, and the others along those they write.
CUT_COLUMNS = ("o_proj.weight", "down_proj.weight")


@dataclass(frozen=True)
class Workload:
    """What is to be run: context length and batch size.

    weights: bf16, fp16, fp32, fp8, int4 or nvfp4; the last three are those of `mistral-large convert --quantize`.
    kv: the cache's numbers, "auto" for those of the activations or "fp8".
    """

    context: int
    batch: int = 1
    weights: str = "bf16"
    kv: str = "auto"
    prefill_chunk: int = PREFILL_CHUNK

    @property
    def number_bytes(self) -> int:
        """Bytes of a number that is not quantized."""
        return BYTES_OF_NUMBER[self.weights]

    @property
    def chunk(self) -> int:
        return min(self.prefill_chunk, self.context)


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parts of a model, or of the shard of them that one of several ranks has."""

    embedding: int
    layer: int
    norm: int
    head: int
    layers: int

    @property
    def weights(self) -> int:
        return self.embedding + self.layers * self.layer + self.norm + self.head

    @classmethod
    def of(cls, config: ModelSizes, weights: str, *, ranks: int = 1) -> "Sizes":
        shapes = {tensor.hf: tensor.shape for tensor in expected_tensors(config, layers=1)}
        first = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.0.")}
        # As the converter chooses it.
        quantized = [shape for name, shape in first.items() if is_quantized(name)]
        group_size = choose_group_size(quantized, weights) if weights in QUANTIZED else 0

        def size(name: str) -> int:
            shape = _shard(name, shapes[name], ranks)
            if weights in QUANTIZED and is_quantized(name):
                return run_time_bytes(shape, weights, group_size)
            return BYTES_OF_NUMBER[weights] * math.prod(shape)

        return cls(
            embedding=size("model.embed_tokens.weight"),
            layer=sum(map(size, first)),
            norm=size("model.norm.weight"),
            head=size("lm_head.weight"),
            layers=config.num_hidden_layers,
        )


def _shard(name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
    """The shape of one rank's shard of a tensor, as the tensor-parallel plans of the classes have it."""
    if name == "model.embed_tokens.weight" or len(shape) == 1:
        return shape
    rows, columns = shape
    return (rows, columns // ranks) if name.endswith(CUT_COLUMNS) else (rows // ranks, columns)


def cache_bytes_of_layer(config: ModelSizes, workload: Workload) -> int:
    """Bytes of one layer's keys and values for all tokens of all sequences."""
    vector = config.head_dim + SCALE_BYTES if workload.kv == "fp8" else config.head_dim * workload.number_bytes
    return 2 * config.num_key_value_heads * vector * workload.context * workload.batch


@dataclass(frozen=True)
class Draft:
    """A smaller model that drafts tokens for the model: its geometry, and weights as in `Workload`."""

    sizes: ModelSizes
    weights: str = "bf16"

    def weight_bytes(self, *, ranks: int = 1) -> int:
        """Bytes of its weights, or of the shard that one of several ranks has."""
        return Sizes.of(self.sizes, self.weights, ranks=ranks).weights

    def cache_bytes(self, workload: Workload, *, ranks: int = 1) -> int:
        """Bytes of its keys and values for the model's workload, up to its own longest context."""
        own = replace(workload, weights=self.weights, context=min(workload.context, self.sizes.max_position_embeddings))
        return self.sizes.num_hidden_layers * cache_bytes_of_layer(self.sizes, own) // ranks

    def total_bytes(self, workload: Workload, *, ranks: int = 1) -> int:
        return self.weight_bytes(ranks=ranks) + self.cache_bytes(workload, ranks=ranks)


def activation_bytes(config: ModelSizes, workload: Workload, *, ranks: int = 1) -> int:
    """The most bytes that the tensors of one layer take at once while a prompt is read, without weights and cache.

    `ranks` share the heads and the intermediate features.
    """
    number, batch, context, chunk = workload.number_bytes, workload.batch, workload.context, workload.chunk
    hidden = config.hidden_size
    query = config.num_attention_heads * config.head_dim // ranks
    intermediate = config.intermediate_size // ranks
    angles = 2 * config.head_dim * chunk
    # The stream before and behind the attention, normed, and three products of the gate.
    feed_forward = (3 * hidden + 3 * intermediate) * chunk
    # The stream, normed, queries and what they attend to.
    attention = (2 * hidden + 2 * query) * chunk
    mask = 0
    if chunk < context or batch > 1:
        # All but the first chunk have a mask, and so has a batch with padding: of one byte a pair and then of one
        # number.
        attention += chunk * context
        mask = batch * chunk * context
    if workload.kv == "fp8":
        # Keys and values of all tokens are unpacked.
        attention += 2 * config.num_key_value_heads * config.head_dim // ranks * context
    if workload.weights == "fp8":
        # What goes into the last product, in fp32 and then as codes.
        feed_forward = max(feed_forward, (2 * hidden + intermediate) * chunk + 5 * intermediate * chunk // number)
    dequantized = 0
    if workload.weights in ("int4", "nvfp4"):
        # At most, while some rows are dequantized and those before are still there.
        dequantized = 8 * min(DEQUANTIZED_AT_ONCE["cuda"], hidden * intermediate)
    # The last position's logits, in fp32 too.
    logits = batch * config.vocab_size * (number + 2 * 4)
    return mask + dequantized + number * batch * (angles + max(feed_forward, attention)) + logits
