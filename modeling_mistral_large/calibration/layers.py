"""Decoder layers quantized one after the other, each by the activations that the quantized layers before it give."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mistral_large_conversion.checkpoint.calibration import Calibration
from mistral_large_conversion.checkpoint.names import TO_HF
from mistral_large_conversion.checkpoint.safetensors_header import TORCH_NAMES
from mistral_large_conversion.destination import Journal
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.stream import WeightStore
from modeling_mistral_large.calibration.hidden_states import HiddenStates, file_name
from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.modeling_mistral_large import MistralLargeModel
from modeling_mistral_large.quantization.gptq import Hessian, quantize_weight
from modeling_mistral_large.quantization.linear import pack_words
from modeling_mistral_large.streamed.layer_stream import decoder_of_one_layer, release

# Linear layers with the same inputs, in the order of the forward pass: what is quantized reaches those after it.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
EMBEDDINGS = TO_HF["tok_embeddings.weight"]


class _Reached(Exception):  # noqa: N818  # no error: the rest of a forward pass is not needed
    """A forward pass has come to the linear layers whose inputs are wanted."""


@dataclass(frozen=True)
class LayerCalibrator:
    """Quantizes the linear layers of a model to int4 by GPTQ on token sequences; see `Calibrator`.

    In memory are one decoder layer, one Hessian with its factor, and one sequence; the states between layers are in a
    file of the destination, by which an interrupted run goes on at the layer it had come to.

    dtype: in which activations are computed.
    """

    calibration: Calibration
    sequences: Sequence[Sequence[int]]
    config: MistralLargeConfig
    group_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def working_bytes(self) -> int:
        # Those that enter a layer and those that leave it.
        return 2 * self._states(Path(), 0).size

    @property
    def working_names(self) -> Iterable[str]:
        return [file_name(layer) for layer in range(self.config.num_hidden_layers)]

    @torch.no_grad()
    def quantize(self, weights: WeightStore, folder: Path, journal: Journal) -> None:
        """Quantize all layers, or those that an interrupted run has not come to.

        Raises:
            CheckpointError: weights or activations that are not finite.
            OSError: the states cannot be written or read.
        """
        layers = self.config.num_hidden_layers
        is_there = [all(map(weights.has, self._names(layer))) for layer in range(layers)]
        states = None if all(is_there) else self._resumed(folder, journal, is_there)
        first = layers if all(is_there) else 0 if states is None else states.layer
        for layer in range(layers):
            if states is None or layer != states.layer:
                self._states(folder, layer).remove()
        for name in (name for layer in range(first) for name in self._names(layer)):
            weights.write(name)
        if first < layers and states is None:
            states = self._states(folder, 0)
            states.write(self._embedded(weights), journal)
        for layer in range(first, layers):
            assert states is not None
            decoder = self._load(weights, layer)
            for stage in STAGES:
                self._quantize_stage(weights, decoder, layer, stage, states)
            following = self._states(folder, layer + 1)
            if following.layer < layers:
                following.write((self._run(decoder, hidden) for hidden in states), journal)
            release(decoder)
            states.remove()
            states = following

    def _states(self, folder: Path, layer: int) -> HiddenStates:
        return HiddenStates(folder, layer, [len(ids) for ids in self.sequences], self.config.hidden_size)

    def _resumed(self, folder: Path, journal: Journal, is_there: Sequence[bool]) -> HiddenStates | None:
        """Return the states that an interrupted run has left, of the last layer before which all are quantized."""
        for layer in reversed(range(self.config.num_hidden_layers)):
            states = self._states(folder, layer)
            if all(is_there[:layer]) and states.is_left_by(journal):
                return states
        return None

    def _names(self, layer: int) -> list[str]:
        return [_weight_name(layer, module) for stage in STAGES for module in stage]

    def _read(self, weights: WeightStore, name: str, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        rows, stored = weights.read(name)
        values = torch.from_numpy(rows).view(getattr(torch, TORCH_NAMES[stored])).view(*shape)
        return values.to(self.device, dtype)

    def _embedded(self, weights: WeightStore) -> Iterator[Tensor]:
        shape = (self.config.vocab_size, self.config.hidden_size)
        table = self._read(weights, EMBEDDINGS, shape, torch.bfloat16)
        for ids in self.sequences:
            yield table[torch.tensor([ids], device=table.device)]

    def _load(self, weights: WeightStore, layer: int) -> MistralLargeModel:
        """Return a decoder of this layer alone, from embeddings on and without a norm at the end."""
        decoder = decoder_of_one_layer(self.config, self.device)
        module = decoder.layers[0]
        parameters = {
            name: self._read(weights, f"model.layers.{layer}.{name}", parameter.shape, self.dtype)
            for name, parameter in module.named_parameters()
        }
        for name, values in parameters.items():
            if not values.isfinite().all():
                wrong = values[~values.isfinite()][0].item()
                raise CheckpointError(
                    f"tensor 'model.layers.{layer}.{name}' holds {wrong}: only finite weights can be quantized; "
                    "download it again"
                )
        module.load_state_dict(parameters, assign=True)
        return decoder

    def _quantize_stage(
        self,
        weights: WeightStore,
        decoder: MistralLargeModel,
        layer: int,
        stage: Sequence[str],
        states: HiddenStates,
    ) -> None:
        """Quantize linear layers with the same inputs, in the decoder and in the files."""
        factor = self._hessian(decoder, layer, stage[0], states).factor(self.calibration.damping)
        for name in stage:
            linear: Any = decoder.layers[0].get_submodule(name)
            codes, scales = quantize_weight(linear.weight, factor, self.group_size)
            weights.write(
                _weight_name(layer, name),
                pack_words(codes.cpu()).view(torch.uint8).numpy(),
                scales.cpu().view(torch.uint8).numpy(),
            )
            linear.weight = nn.Parameter(dequantized(codes, scales, self.group_size).to(self.dtype), False)

    def _hessian(self, decoder: MistralLargeModel, layer: int, name: str, states: HiddenStates) -> Hessian:
        linear: Any = decoder.layers[0].get_submodule(name)
        hessian = Hessian(linear.in_features, self.device)

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hessian.add(inputs[0])
            raise _Reached

        hook = linear.register_forward_pre_hook(add)
        try:
            for hidden in states:
                with suppress(_Reached):
                    self._run(decoder, hidden)
        finally:
            hook.remove()
        if not hessian.sum.diagonal().isfinite().all():
            raise CheckpointError(
                f"layer {layer}: the inputs of {name} are not finite on the calibration data; a checkpoint that "
                "computes finite numbers can be calibrated; check it, or leave --calibration out"
            )
        return hessian

    def _run(self, decoder: MistralLargeModel, hidden: Tensor) -> Tensor:
        """Apply the layer to states [1, tokens, hidden_size] from position 0 on."""
        embeddings = hidden.to(self.device, self.dtype)
        output: Tensor = decoder(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        return output


def _weight_name(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{module}.weight"


def dequantized(codes: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Return the FP32 values [rows, columns] of codes 0…15 and BF16 scales, as `quantize_weight` returns them."""
    groups = codes.float().sub_(8).view(len(codes), -1, group_size)
    return groups.mul_(scales.float().unsqueeze(-1)).flatten(-2)
