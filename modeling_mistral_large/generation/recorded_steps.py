"""Decoding with steps that are recorded once as a CUDA graph: one launch for each token instead of thousands.

A step runs the kernels of `gpu_kernels` on the weights of a loaded model, BF16, FP8 or int4, and on a static cache
that it owns. Prompts are read by the model itself, in chunks, into that cache. Products of a step take activations
unrounded: with FP8 weights a step is W8A16, while the model's own forward, and so the prompt, is W8A8.

    from modeling_mistral_large.generation.recorded_steps import record_decoding

    decoding = record_decoding(model, context_length=32768)
    output = decoding.generate(**tokenizer.apply_chat_template(messages, return_tensors="pt"), max_new_tokens=256)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mistral_large_conversion.errors import MissingLibraryError, SettingError
from mistral_large_conversion.sharding.memory import PREFILL_CHUNK
from modeling_mistral_large.modeling_mistral_large import MistralLargeForCausalLM
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear

if TYPE_CHECKING:
    from modeling_mistral_large.inference.gpu_kernels import Weights

# int4 groups that one product of matrices can take at a time.
GROUP_SIZES = (64, 128)
# cuDNN's attention plans every new length anew, and a prompt's chunks each have one.
PROMPT_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
# Slots of the cache for which attention is split once more.
SLOTS_PER_SPLIT = 512
LEAST_SPLITS, MOST_SPLITS = 8, 64


class StaticLayer(DynamicLayer):
    """One layer's keys and values [batch, kv_heads, context_length, head_dim]; the model sees the filled slots."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.all_keys, self.all_values = keys, values
        self.is_initialized = True
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = keys[:, :, :0], values[:, :, :0]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        self.all_keys[:, :, start:end] = key_states
        self.all_values[:, :, start:end] = value_states
        self.keys, self.values = self.all_keys[:, :, :end], self.all_values[:, :, :end]
        return self.keys, self.values


@dataclass(frozen=True)
class LayerWeights:
    """What a step needs of a decoder layer."""

    attention_gain: Tensor
    qkv: Weights
    output: Weights
    mlp_gain: Tensor
    gate_up: Weights
    down: Weights
    keys: Tensor
    values: Tensor


def record_decoding(model: MistralLargeForCausalLM, context_length: int, batch: int = 1) -> RecordedDecoding:
    """Record a decoding step of a model on one GPU.

    The cache for `batch` sequences (1 to 16) of `context_length` tokens, prompt and completion together, is allocated
    at once. The model is not copied; int4 weights are put back into the packed layout of their checkpoint, in place.
    Changing or moving the model afterwards is not noticed: record again.

    Raises:
        MissingLibraryError: Triton is not installed.
        SettingError: sizes out of range, or a model whose steps cannot be recorded: not on one GPU, not BF16, sharded,
            offloaded, with hooks or adapters, or in training mode.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingLibraryError(
            "recorded steps need Triton, which the CUDA builds of torch bring along; pip install triton"
        ) from error
    if not 1 <= batch <= 16:
        raise SettingError(f"batch {batch}: recorded steps take 1 to 16 sequences; split the batch")
    most = model.config.max_position_embeddings
    if not 1 <= context_length <= most:
        raise SettingError(f"context_length {context_length}: must be 1 to {most}, the model's longest context")
    if obstacle := obstacle_to_recording(model):
        raise SettingError(f"recorded steps: {obstacle}; decode with model.generate instead")
    return RecordedDecoding(model, context_length, batch)


def obstacle_to_recording(model: nn.Module) -> str | None:
    """Why the steps of a model cannot be recorded, or None."""
    if not isinstance(model, MistralLargeForCausalLM):
        return f"{type(model).__name__} is not MistralLargeForCausalLM"
    if model.training:
        return "the model is in training mode"
    if any(type(parameter) is not nn.Parameter for parameter in model.parameters()):
        return "the weights are sharded, or of a special tensor type"
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        return f"the model lies on several devices: {', '.join(sorted(map(str, devices)))}"
    (device,) = devices
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the model lies on the CPU"
    if device.type not in ("cuda", "cpu") or torch.version.hip is not None:
        return f"no kernels for {device}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernels need compute capability 8.0 or higher"
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    if embeddings.dtype != torch.bfloat16:
        return f"the model is in {str(embeddings.dtype).removeprefix('torch.')}, not in bfloat16"
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") or module._forward_hooks or module._forward_pre_hooks:
            return f"{name or 'the model'} has hooks, which a recorded step would skip"
        is_plain = type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.bias is None
        is_quantized = type(module) in (Fp8Linear, Int4Linear)
        if name.endswith(("_proj", "lm_head")) and not (is_plain or is_quantized):
            return f"{name} is {type(module).__name__}, not a BF16, FP8 or int4 linear layer without bias"
        if isinstance(module, Int4Linear) and module.group_size not in GROUP_SIZES:
            return f"{name} has int4 groups of {module.group_size}, not of 64 or 128"
    head_dim = model.config.head_dim
    if head_dim < 16 or head_dim & (head_dim - 1):
        return f"head_dim {head_dim} is not a power of two of at least 16"
    return None


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
    """A recorded step, its cache and its inputs; made by `record_decoding`. One completion or batch at a time."""

    def __init__(self, model: Any, context_length: int, batch: int) -> None:
        from modeling_mistral_large.inference import gpu_kernels

        self.kernels = gpu_kernels
        self.model, self.context_length, self.batch = model, context_length, batch
        config, decoder, device = model.config, model.model, model.device
        self.scaling, self.eps = config.head_dim**-0.5, config.rms_norm_eps
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def weights_of_layer(layer: Any) -> LayerWeights:
            attention, mlp = layer.self_attn, layer.mlp
            return LayerWeights(
                layer.input_layernorm.weight.detach(),
                weights_of(attention.q_proj, attention.k_proj, attention.v_proj),
                weights_of(attention.o_proj),
                layer.post_attention_layernorm.weight.detach(),
                weights_of(mlp.gate_proj, mlp.up_proj),
                weights_of(mlp.down_proj),
                empty(batch, kv_heads, context_length, head_dim),
                empty(batch, kv_heads, context_length, head_dim),
            )

        self.layers = [weights_of_layer(layer) for layer in decoder.layers]
        self.embeddings, self.final_gain = decoder.embed_tokens.weight.detach(), decoder.norm.weight.detach()
        self.head = weights_of(model.lm_head)
        self.angles = [
            table[0].contiguous()
            for table in decoder.rotary_emb(empty(1), torch.arange(context_length, device=device)[None])
        ]
        self.stream, self.normed = empty(batch, config.hidden_size), empty(batch, config.hidden_size)
        self.query, self.attended = empty(batch, heads, head_dim), empty(batch, heads * head_dim)
        self.gated = empty(batch, config.intermediate_size)
        products = [each for layer in self.layers for each in (layer.qkv, layer.output, layer.gate_up, layer.down)]
        room = max(each.splits(batch) * batch * each.rows for each in products)
        self.part = empty(room, dtype=torch.float32)
        wanted = max(LEAST_SPLITS, min(MOST_SPLITS, context_length // SLOTS_PER_SPLIT))
        splits = 1 << (wanted - 1).bit_length()
        self.attention_parts = empty(batch, heads, splits, head_dim, dtype=torch.float32)
        self.attention_stats = empty(batch, heads, splits, 2, dtype=torch.float32)
        self.logits = empty(batch, self.head.rows, dtype=torch.float32)
        # What a step reads: the tokens, the number of filled slots, and each sequence's first slot that is no padding.
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self.starts = torch.zeros(batch, dtype=torch.int32, device=device)
        self.run = self._recorded() if device.type == "cuda" else self._step

    def _recorded(self) -> Callable[[], None]:
        with torch.cuda.device(self.model.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            # Compiles the kernels, which cannot be done while recording.
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        return graph.replay

    @torch.no_grad()
    def _step(self) -> None:
        """From `ids` to `logits` and the greedy `ids`, one slot further."""
        kernels, part, at = self.kernels, self.part, (self.length, self.starts)
        torch.index_select(self.embeddings, 0, self.ids, out=self.stream)
        splits = 0
        for layer in self.layers:
            kernels.norm(self.stream, part, splits, layer.attention_gain, self.eps, self.normed, layer.qkv.group)
            splits = kernels.multiply(self.normed, layer.qkv, part)
            kernels.rotate(part, splits, self.query, layer.keys, layer.values, self.angles, at)
            kernels.attend(
                self.query, layer.keys, layer.values, at, self.scaling, self.attention_parts, self.attention_stats,
                self.attended, layer.output.group,
            )  # fmt: skip
            splits = kernels.multiply(self.attended, layer.output, part)
            kernels.norm(self.stream, part, splits, layer.mlp_gain, self.eps, self.normed, layer.gate_up.group)
            splits = kernels.multiply(self.normed, layer.gate_up, part)
            kernels.gate(part, splits, self.gated, layer.down.group)
            splits = kernels.multiply(self.gated, layer.down, part)
        kernels.norm(self.stream, part, splits, self.final_gain, self.eps, self.normed, self.head.group)
        kernels.multiply(self.normed, self.head, self.logits, splits=1)
        self.length += 1
        torch.argmax(self.logits, dim=-1, out=self.ids)

    @torch.no_grad()
    def read_prompt(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Fill the cache from its start with left-padded prompts [batch, tokens]; return logits [batch, vocab]."""
        device = self.model.device
        input_ids = input_ids.to(device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(device)
        batch, length = input_ids.shape
        if batch != self.batch or mask.shape != input_ids.shape:
            raise SettingError(
                f"prompt {list(input_ids.shape)} with a mask {list(mask.shape)}: recorded for {self.batch} sequences; "
                "pass both as [batch, tokens], or record for this batch"
            )
        if length > self.context_length:
            raise SettingError(f"{length} tokens of prompt: recorded for a context of {self.context_length}")
        if not bool(mask[:, -1:].all()) or bool((mask.diff(dim=-1) < 0).any()):
            raise SettingError("attention_mask: a sequence must be padded on its left only, and not be empty")
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        is_padded = not bool(mask.all())
        cache = Cache(layers=[StaticLayer(layer.keys, layer.values) for layer in self.layers])
        logits = self.logits
        with sdpa_kernel(PROMPT_ATTENTION):
            for start in range(0, length, PREFILL_CHUNK):
                chunk = slice(start, start + PREFILL_CHUNK)
                logits = self.model(
                    input_ids[:, chunk],
                    attention_mask=mask[:, : chunk.stop] if is_padded else None,
                    position_ids=positions[:, chunk],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
        self.length.fill_(length)
        self.starts.copy_((mask == 0).sum(-1))
        return logits

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | list[int] | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue left-padded prompts [batch, tokens]; return [batch, tokens + new tokens], finished rows padded.

        Tokens that end a completion are `eos_token_id`, by default those of the model's generation config; no other
        setting is taken from there.

        Raises:
            SettingError: more tokens than were recorded for, a prompt that is not [batch, tokens], settings of sampling
                without `do_sample`.
        """
        if max_new_tokens < 1 or input_ids.shape[-1] + max_new_tokens - 1 > self.context_length:
            raise SettingError(
                f"{input_ids.shape[-1]} tokens of prompt and {max_new_tokens} new ones: recorded for a context of "
                f"{self.context_length}; record for a longer one"
            )
        if not do_sample and (temperature, top_k, top_p, generator) != (1.0, 0, 1.0, None):
            raise SettingError("temperature, top_k, top_p, generator: without effect unless do_sample=True")
        settings = self.model.generation_config
        ends = settings.eos_token_id if eos_token_id is None else eos_token_id
        end_ids = torch.tensor([ends] if isinstance(ends, int) else ends or [], dtype=torch.int64)
        pad = settings.pad_token_id
        warpers = LogitsProcessorList()
        if temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p != 1.0:
            warpers.append(TopPLogitsWarper(top_p))

        def choose(logits: Tensor) -> Tensor:
            if not do_sample:
                return logits.argmax(-1)
            scores = warpers(input_ids, logits.float())  # type: ignore[arg-type]  # typed for one kind of int tensor
            return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

        rows: list[Tensor] = []
        finished = torch.zeros(self.batch, dtype=torch.bool)
        for ids in self._tokens(self.read_prompt(input_ids, attention_mask), choose, max_new_tokens, do_sample):
            # Without a token for padding, the first one that ends a completion is repeated, as transformers does it.
            rows.append(ids.masked_fill(finished, (end_ids.tolist() or [0])[0] if pad is None else pad))
            finished |= torch.isin(ids, end_ids)
            if bool(finished.all()):
                break
        return torch.cat((input_ids, torch.stack(rows, dim=-1).to(input_ids.device)), dim=-1)

    def _tokens(
        self, logits: Tensor, choose: Callable[[Tensor], Tensor], count: int, do_sample: bool
    ) -> Iterator[Tensor]:
        """Ids [batch] of one step after another, on the host; the next step is launched before they are waited for."""
        is_gpu = self.ids.is_cuda
        on_host = torch.empty(count, self.batch, dtype=torch.int64, pin_memory=is_gpu)
        events: list[Any] = []

        def keep(step: int) -> None:
            on_host[step].copy_(self.ids, non_blocking=True)
            if is_gpu:
                events.append(torch.cuda.Event())
                events[-1].record(torch.cuda.current_stream(self.ids.device))

        self.ids.copy_(choose(logits))
        keep(0)
        for step in range(count):
            if step + 1 < count:
                self.run()
                if do_sample:
                    self.ids.copy_(choose(self.logits))
                keep(step + 1)
            if is_gpu:
                events[step].synchronize()
            yield on_host[step].clone()
