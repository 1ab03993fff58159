"""A model that is never whole in memory: its decoder layers are read from the checkpoint one at a time."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mistral_large_conversion.checkpoint.names import TO_HF, expected_tensors
from mistral_large_conversion.checkpoint.quantization import is_part
from mistral_large_conversion.checkpoint.read import Checkpoint
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor
from mistral_large_conversion.errors import SettingError
from modeling_mistral_large.configuration_mistral_large import MistralLargeConfig
from modeling_mistral_large.modeling_mistral_large import (
    MistralLargeDecoderLayer,
    MistralLargeModel,
    MistralLargeRMSNorm,
    MistralLargeRotaryEmbedding,
)
from modeling_mistral_large.quantization import quantize_modules_, use_kernels_
from modeling_mistral_large.streamed.tensors import gather_rows, read_rows, stored_dtype

EMBEDDINGS, NORM, HEAD = (TO_HF[name] for name in ("tok_embeddings.weight", "norm.weight", "output.weight"))
LAYERS = "model.layers."
LAYER = LAYERS + "{index}.{name}"
# Rows of the output matrix that are in memory at once: 0.1 GB of 2407 in fp32.
HEAD_ROWS = 2048


class LayerStream:
    """The model of a checkpoint, one decoder layer in memory at a time, with the numerics of the whole model.

    Embeddings, layers, norm and output matrix are those that `MistralLargeForCausalLM.from_pretrained` makes of the
    same checkpoint, in eval mode: quantized weights stay quantized, FP8 is W8A8.

        stream = LayerStream(open_checkpoint(folder))
        hidden = stream.embed(ids)
        for _, layer in stream.layers():
            hidden = stream.run(layer, hidden)
        logits = stream.logits(stream.norm(hidden))
    """

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> None:
        """Read the config of a checkpoint, and no weights yet.

        checkpoint: what `mistral_large_conversion.checkpoint.open_checkpoint` returns.
        dtype: in which it computes; without it, the one in which the model would be loaded.
        device: "auto" is a GPU where there is one.

        Raises:
            SettingError: a dtype that no product can be computed in, as FP8; a device that is not there.
            CheckpointError, ConfigurationError: a config that is none of a Mistral Large.
        """
        self.checkpoint = checkpoint
        self.device = usable_device(device)
        self.quantization = checkpoint.quantization
        self._tensors: dict[str, tuple[FileTensor, int | None]] = {}
        self._collect_tensors()
        self.config = MistralLargeConfig.from_pretrained(checkpoint.folder)
        self.dtype = dtype or self._loaded_dtype()
        if not self.dtype.is_floating_point or self.dtype.itemsize < 2:
            raise SettingError(
                f"{checkpoint.folder}: computes in {str(self.dtype).removeprefix('torch.')}, which has no products; "
                "pass dtype: bfloat16, float16 or float32"
            )
        self._decoder = decoder_of_one_layer(self.config, self.device)

    def _collect_tensors(self) -> None:
        """Note by HF name where each tensor is, and the head_dim by which its rows are brought into the HF order."""
        stored, is_consolidated = self.checkpoint.tensors, self.checkpoint.layout == "consolidated"
        if not is_consolidated:
            self._tensors = {name: (tensor, None) for name, tensor in stored.items()}
            return
        for tensor in expected_tensors(self.checkpoint.geometry):
            head_dim = self.checkpoint.geometry.head_dim if tensor.has_rope_pairs else None
            self._tensors[tensor.hf] = (stored[tensor.consolidated], head_dim)

    def _loaded_dtype(self) -> torch.dtype:
        """Return the dtype in which `from_pretrained` would load the model."""
        named = self.config.dtype
        if isinstance(named, str):
            named = getattr(torch, named)
        return stored_dtype(self._tensors[EMBEDDINGS][0]) if named is None else named

    @property
    def layer_count(self) -> int:
        return self.config.num_hidden_layers

    def layer_bytes(self, index: int | None = None) -> int:
        """Return how many bytes of the files a decoder layer has, or all of them."""
        prefix = LAYERS if index is None else LAYER.format(index=index, name="")
        return sum(tensor.size for name, (tensor, _) in self._tensors.items() if name.startswith(prefix))

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings [batch, tokens, hidden_size] of ids [batch, tokens]; only their rows are read."""
        return gather_rows(self._tensors[EMBEDDINGS][0], ids, dtype=self.dtype, device=self.device)

    def load_layer(self, index: int) -> MistralLargeDecoderLayer:
        """Read a decoder layer, quantized as the checkpoint is, in eval mode and without gradients.

        Raises:
            CheckpointError: its file has changed since it was opened.
        """
        with torch.device("meta"):
            layer = MistralLargeDecoderLayer(self._decoder.config, index)
        # A module by whose names its linear layers are known.
        holder = nn.Module()
        holder.layers = nn.ModuleList([layer])
        if self.quantization is not None:
            quantize_modules_(holder, *self.quantization)
        layer.requires_grad_(False).train(False)
        parameters = {
            name: self._read(LAYER.format(index=index, name=name), parameter)
            for name, parameter in layer.named_parameters()
        }
        layer.load_state_dict(parameters, assign=True)
        use_kernels_(layer)
        return layer

    def layers(self) -> Iterator[tuple[int, MistralLargeDecoderLayer]]:
        """Yield the number and the module of each decoder layer; the one before has lost its weights by then."""
        for index in range(self.layer_count):
            layer = self.load_layer(index)
            yield index, layer
            release(layer)

    @torch.no_grad()
    def run(self, layer: MistralLargeDecoderLayer, hidden: Tensor) -> Tensor:
        """Apply a decoder layer to hidden states [batch, tokens, hidden_size] of whole sequences from position 0."""
        self._decoder.layers = nn.ModuleList([layer])
        try:
            output: Tensor = self._decoder(inputs_embeds=hidden.to(self.device), use_cache=False).last_hidden_state
        finally:
            self._decoder.layers = nn.ModuleList()
        return output

    @torch.no_grad()
    def norm(self, hidden: Tensor) -> Tensor:
        """Apply the norm after the last layer."""
        norm = MistralLargeRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight = nn.Parameter(self._read(NORM), requires_grad=False)
        normed: Tensor = norm(hidden.to(self.device))
        return normed

    def head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the output matrix in blocks of rows, each with the number of its first row."""
        tensor, _ = self._tensors[HEAD]
        for start in range(0, self.config.vocab_size, HEAD_ROWS):
            block = range(start, min(start + HEAD_ROWS, self.config.vocab_size))
            yield start, read_rows(tensor, block, dtype=self.dtype, device=self.device)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits [..., vocab_size] of normed hidden states, all at once."""
        return torch.cat([nn.functional.linear(hidden, block) for _, block in self.head_blocks()], dim=-1)

    def _read(self, name: str, parameter: Tensor | None = None) -> Tensor:
        """Read a tensor by its HF name; parts of a quantized weight have the dtype of `parameter`."""
        tensor, head_dim = self._tensors[name]
        is_quantized = self.quantization is not None and parameter is not None and is_part(name)
        dtype = parameter.dtype if is_quantized and parameter is not None else self.dtype
        return read_rows(tensor, range(tensor.shape[0]), dtype=dtype, device=self.device, head_dim=head_dim)


def decoder_of_one_layer(config: MistralLargeConfig, device: torch.device) -> MistralLargeModel:
    """Return a decoder for one layer at a time: its forward makes mask and rotary angles for embeddings that it gets.

    It has no norm, which comes after all layers, and its layer has no weights.
    """
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    with torch.device("meta"):
        decoder = MistralLargeModel(config)
    for name in ("embed_tokens", "norm"):
        decoder.set_submodule(name, nn.Identity())
    decoder.rotary_emb = MistralLargeRotaryEmbedding(config).to(device)
    decoder.requires_grad_(False).train(False)
    return decoder


def release(layer: nn.Module) -> None:
    """Free the weights of a layer, whoever still holds the module."""
    for module in layer.modules():
        for name in list(module._parameters):
            module._parameters[name] = None


def usable_device(device: torch.device | str) -> torch.device:
    """Return a device by its name; "auto" is a GPU where there is one.

    Raises:
        SettingError: there is none of this name.
    """
    if device == "auto":
        kind = next((name for name in ("cuda", "mps") if getattr(torch, name).is_available()), "cpu")
        return torch.device(kind)
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SettingError(f"device {str(device)!r}: {reason}; pass auto, cpu, cuda, cuda:1 or mps") from error
    return found
