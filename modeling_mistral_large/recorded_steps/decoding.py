"""Decoding with steps that are recorded once as a CUDA graph: one launch for each token instead of thousands.

A step runs the kernels of `gpu_kernels` on the weights of a loaded model, BF16, FP8 or int4, and on a static cache
that it owns. Prompts are read by the model itself, in chunks, into that cache. A step computes what the model's own
forward does: W8A8 with FP8 weights, W4A16 with int4.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from mistral_large_conversion.errors import MissingLibraryError, SettingError
from modeling_mistral_large.inference.kv_cache import SCALE
from modeling_mistral_large.inference.static_cache import Fp8States, States, of_each
from modeling_mistral_large.quantization import gpu_int4
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear
from modeling_mistral_large.recorded_steps.obstacles import obstacle_to_recording

if TYPE_CHECKING:
    from modeling_mistral_large.inference.gpu_kernels import Weights

# Rows that one product takes: sequences, or tokens of a single sequence.
MOST_ROWS = 16
# Slots of the cache for which attention is split once more.
SLOTS_PER_SPLIT = 512
LEAST_SPLITS, MOST_SPLITS = 8, 64
# Slots of the smallest cache, and of the steps in which small ones grow.
LEAST_SLOTS = 256


CacheDtype = Literal["bf16", "fp8"]


@dataclass
class LayerWeights:
    """What a step needs of a decoder layer: weights, and keys and values [batch, kv_heads, slots, head_dim]."""

    attention_gain: Tensor
    qkv: Weights
    output: Weights
    mlp_gain: Tensor
    gate_up: Weights
    down: Weights
    keys: States
    values: States


def record_decoding(
    model: nn.Module, context_length: int, batch: int = 1, *, cache: CacheDtype = "bf16"
) -> RecordedDecoding:
    """Allocate the cache of a model on one GPU, and record its decoding step.

    The cache for `batch` sequences (1 to 16) holds `context_length` tokens of each, prompt and completion together,
    and grows when there are more; `cache="fp8"` takes 51 % of the memory, and rounds as `Fp8Cache` does. The model is
    not copied; int4 weights are put back into the packed layout of their checkpoint, in place.

    Raises:
        MissingLibraryError: Triton is not installed.
        SettingError: sizes out of range, or a model whose steps cannot be recorded: not on one GPU, not BF16, sharded,
            offloaded, with hooks or adapters, or in training mode.
    """
    if not gpu_int4.HAS_TRITON:
        raise MissingLibraryError(
            "recorded steps need Triton, which the CUDA builds of torch bring along; pip install triton"
        )
    if not 1 <= batch <= MOST_ROWS:
        raise SettingError(f"batch {batch}: recorded steps take 1 to {MOST_ROWS} sequences; split the batch")
    if cache not in get_args(CacheDtype):
        raise SettingError(f"cache {cache!r}: must be 'bf16' or 'fp8'")
    if obstacle := obstacle_to_recording(model):
        raise SettingError(f"recorded steps: {obstacle}; pass no RecordedCache, and generate decodes without them")
    config: Any = model.config
    most = config.max_position_embeddings
    if not 1 <= context_length <= most:
        raise SettingError(f"context_length {context_length}: must be 1 to {most}, the model's longest context")
    return RecordedDecoding(model, context_length, batch, cache)


def slots_for(tokens: int) -> int:
    """The size of a cache for a number of tokens: up to a quarter larger, so that few sizes are recorded."""
    step = max(LEAST_SLOTS, 1 << max(0, tokens.bit_length() - 3))
    return -(-tokens // step) * step


def fingerprint_of(model: nn.Module) -> tuple[int, ...]:
    """Where the weights of a model lie: a graph holds these addresses."""
    return tuple(tensor.data_ptr() for tensors in (model.parameters(), model.buffers()) for tensor in tensors)


def weights_of(*linears: Any) -> Weights:
    """The weights of linear layers with the same input, in the checkpoint's layout."""
    from modeling_mistral_large.inference.gpu_kernels import Weights

    assert len({type(linear) for linear in linears}) == 1, "quantized all or not at all"
    first = linears[0]
    if isinstance(first, Int4Linear):
        for linear in linears:
            if linear.layout is not None:
                linear.use_packed_layout_()
        weights = tuple(linear.weight_packed.detach() for linear in linears)
        scales = tuple(linear.weight_scale.detach() for linear in linears)
        return Weights("int4", first.columns, first.group_size, weights, scales)
    weights = tuple(linear.weight.detach() for linear in linears)
    if isinstance(first, Fp8Linear):
        scales = tuple(linear.weight_scale.detach() for linear in linears)
        device = weights[0].device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            bits = tuple(weight.view(torch.uint8) for weight in weights)
            return Weights("fp8_bits", first.in_features, 0, bits, scales)
        return Weights("fp8", first.in_features, 0, weights, scales)
    return Weights("bf16", first.in_features, 0, weights, weights)


class RecordedDecoding:
    """A recorded step, its static cache and its inputs; made by `record_decoding`. One call at a time.

    `filled` tokens of each sequence are in the cache. It holds the weights and not the model, which may be deleted.
    """

    # Fixed as long as a graph is: what is allocated under torch.inference_mode could not be written outside of it.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, context_length: int, batch: int, cache: CacheDtype = "bf16") -> None:
        from modeling_mistral_large.inference import gpu_kernels

        self.kernels = gpu_kernels
        self.batch, self.filled, self.slots, self.cache_dtype = batch, 0, 0, cache
        self.rows = batch if batch > 1 else MOST_ROWS
        self.device, self._model = model.device, weakref.ref(model)
        self.layers: list[LayerWeights] = []
        self.graphs: dict[int, Callable[[], None]] = {}
        # The cache that hands this recording to `generate`, while there is one.
        self.holder: weakref.ref[Any] | None = None
        self.read_weights(model)
        self.reserve(context_length)

    def read_weights(self, model: Any) -> None:
        """Take the weights where they now lie; what is recorded for others is dropped."""
        config, decoder = model.config, model.model
        kept: list[LayerWeights] = self.layers if self.slots else []

        def weights_of_layer(number: int, layer: Any) -> LayerWeights:
            attention, mlp = layer.self_attn, layer.mlp
            nothing = self._no_states(config.num_key_value_heads, config.head_dim)
            return LayerWeights(
                layer.input_layernorm.weight.detach(),
                weights_of(attention.q_proj, attention.k_proj, attention.v_proj),
                weights_of(attention.o_proj),
                layer.post_attention_layernorm.weight.detach(),
                weights_of(mlp.gate_proj, mlp.up_proj),
                weights_of(mlp.down_proj),
                kept[number].keys if kept else nothing,
                kept[number].values if kept else nothing,
            )

        self.config, self.rotary = config, decoder.rotary_emb
        self.layers = [weights_of_layer(number, layer) for number, layer in enumerate(decoder.layers)]
        self.embeddings, self.final_gain = decoder.embed_tokens.weight.detach(), decoder.norm.weight.detach()
        self.head = weights_of(model.lm_head)
        # After the weights: those of int4 may have been moved.
        self.fingerprint = fingerprint_of(model)
        self.graphs.clear()

    def _no_states(self, kv_heads: int, head_dim: int) -> States:
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(self.batch, kv_heads, 0, *shape, dtype=dtype, device=self.device)

        if self.cache_dtype == "fp8":
            return Fp8States(empty(head_dim, dtype=torch.float8_e4m3fn), empty(dtype=SCALE))
        return empty(head_dim, dtype=torch.bfloat16)

    def is_of(self, model: Any) -> bool:
        """Whether it was made of this model."""
        return self._model() is model

    def reserve(self, context_length: int) -> None:
        """Make room for a number of tokens of each sequence; what is filled stays."""
        if context_length + MOST_ROWS > self.slots:
            self._allocate(slots_for(context_length + MOST_ROWS))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _allocate(self, slots: int) -> None:
        # Graphs hold the addresses of what is replaced.
        self.graphs.clear()
        self.slots = slots
        for layer in self.layers:
            # One after another: at no time are there two caches.
            layer.keys, layer.values = (of_each(self._larger, states) for states in (layer.keys, layer.values))
        self._make_buffers()

    def _larger(self, states: Tensor) -> Tensor:
        batch, kv_heads, _, *of_head = states.shape
        larger = states.new_empty(batch, kv_heads, self.slots, *of_head)
        larger[:, :, : self.filled] = states[:, :, : self.filled]
        return larger

    def _make_buffers(self) -> None:
        """What the kernels of a step write and read, for the largest number of rows."""
        config, rows = self.config, self.rows
        heads, head_dim = config.num_attention_heads, config.head_dim

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=self.device)

        positions = torch.arange(self.slots, device=self.device)[None]
        self.angles = [table[0].contiguous() for table in self.rotary(empty(1), positions)]
        self.stream, self.normed = empty(rows, config.hidden_size), empty(rows, config.hidden_size)
        self.query, self.attended = empty(rows, heads, head_dim), empty(rows, heads * head_dim)
        self.gated = empty(rows, config.intermediate_size)
        self.normed_scales = empty(rows, dtype=torch.float32)
        products = [each for layer in self.layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        room = max(each.splits(m) * m * each.rows for each in products for m in {self.batch, rows})
        self.part = empty(room, dtype=torch.float32)
        wanted = max(LEAST_SPLITS, min(MOST_SPLITS, self.slots // SLOTS_PER_SPLIT))
        splits = 1 << (wanted - 1).bit_length()
        self.attention_parts = empty(rows, heads, splits, head_dim, dtype=torch.float32)
        self.attention_stats = empty(rows, heads, splits, 2, dtype=torch.float32)
        self.logits = empty(rows, self.head.rows, dtype=torch.float32)
        # What a step reads of each row: token, slot of its key, and its sequence's first slot that is no padding.
        self.ids = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self.starts = torch.zeros(rows, dtype=torch.int32, device=self.device)
        # Rows are sequences at the same slot, or the successive tokens of one sequence.
        self.offsets = torch.arange(rows, dtype=torch.int32, device=self.device) * (self.batch == 1)

    def clone(self) -> RecordedDecoding:
        """A recording of the same weights, with a copy of the cache."""
        other = copy.copy(self)
        other.graphs, other.holder = {}, None
        other.layers = [
            replace(each, keys=of_each(torch.clone, each.keys), values=of_each(torch.clone, each.values))
            for each in self.layers
        ]
        other._make_buffers()
        return other

    @torch.no_grad()
    def decode(self, ids: Tensor, starts: Tensor | None) -> Tensor:
        """Read ids [batch, tokens], whose rows have left padding of `starts` [batch]; return logits of each, in FP32.

        Several tokens, up to 16, are for a single sequence only.
        """
        batch, tokens = ids.shape
        assert batch == self.batch
        assert tokens == 1 or batch == 1, "rows are sequences, or tokens of one sequence"
        # Fewer sizes are recorded; what rows behind the last token leave in the cache is not counted as filled.
        run_tokens = 1 << (tokens - 1).bit_length()
        self.reserve(self.filled + tokens)
        rows = batch * run_tokens
        self.ids[: batch * tokens].copy_(ids.reshape(-1))
        torch.add(self.offsets[:rows], self.filled, out=self.lengths[:rows])
        if starts is None:
            self.starts.zero_()
        else:
            self.starts[:rows] = starts
        self.run(run_tokens)
        self.filled += tokens
        return self.logits[: batch * tokens].view(batch, tokens, -1).clone()

    def run(self, tokens: int = 1) -> None:
        """Replay the step of this number of tokens of each sequence; record it the first time."""
        self.record(tokens)
        if self.device.type == "cuda":
            self.graphs[tokens]()
        else:
            self._step(tokens)

    def record(self, tokens: int = 1) -> None:
        """Record the step of this number of tokens of each sequence, unless it is recorded; the CPU has no graphs."""
        if self.device.type == "cuda" and tokens not in self.graphs:
            self.graphs[tokens] = self._recorded(tokens)

    def _recorded(self, tokens: int) -> Callable[[], None]:
        step = partial(self._step, tokens)
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Compiles the kernels, which cannot be done while recording.
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on using the GPU.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()
        return graph.replay

    @torch.no_grad()
    def _step(self, tokens: int) -> None:
        """From `ids`, at `lengths`, to `logits`."""
        rows = self.batch * tokens
        kernels, part, at = self.kernels, self.part, (self.lengths[:rows], self.starts[:rows])
        stream, normed, gated = self.stream[:rows], self.normed[:rows], self.gated[:rows]
        query, attended = self.query[:rows], self.attended[:rows]
        parts, stats = self.attention_parts[:rows], self.attention_stats[:rows]
        scaling, eps = self.config.head_dim**-0.5, self.config.rms_norm_eps
        torch.index_select(self.embeddings, 0, self.ids[:rows], out=stream)
        splits = 0

        def multiply_normed(gain: Tensor, weights: Weights, splits: int) -> int:
            scales = self.normed_scales[:rows] if weights.takes_fp8 else None
            kernels.norm(stream, part, splits, gain, eps, normed, weights.group, scales)
            return int(kernels.multiply(normed, weights, part, scales))

        for layer in self.layers:
            splits = multiply_normed(layer.attention_gain, layer.qkv, splits)
            kernels.rotate(part, splits, query, layer.keys, layer.values, self.angles, at)
            kernels.attend(
                query, layer.keys, layer.values, at, scaling, parts, stats, attended, layer.output.group
            )  # fmt: skip
            splits = kernels.multiply(attended, layer.output, part)
            splits = multiply_normed(layer.mlp_gain, layer.gate_up, splits)
            kernels.gate(part, splits, gated, layer.down.group)
            splits = kernels.multiply(gated, layer.down, part)
        kernels.norm(stream, part, splits, self.final_gain, eps, normed, self.head.group)
        kernels.multiply(normed, self.head, self.logits[:rows], splits=1)
