"""How transformers loads and saves models whose linear layers stay quantized, and what it must not pass over."""

import copy
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from mistral_large_conversion.checkpoint.quantization import (
    QUANT_METHOD,
    Scheme,
    quantization_of,
)
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError
from modeling_mistral_large.configuration_mistral_large import OPTIONS_OF_FILES
from modeling_mistral_large.quantization.linear import Fp8Linear, Int4Linear, QuantizedLinear
from modeling_mistral_large.quantization.nvfp4 import Nvfp4Linear
from modeling_mistral_large.transformers_api.models import QuantizerHook, ignore_unexpected_keys, is_sharded

# Under this name transformers finds the classes below; in files it is compressed-tensors.
LOADED_METHOD = "mistral_large"

LAYERS: dict[Scheme, type[QuantizedLinear]] = {"fp8": Fp8Linear, "int4": Int4Linear, "nvfp4": Nvfp4Linear}

LINEAR_NAME = re.compile(r"(?:.*\.)?layers\.\d+\.(?:self_attn|mlp)\.\w+_proj")

LINEAR_PART = re.compile(r"(?:.*\.)?(layers\.\d+\.(?:self_attn|mlp)\.\w+_proj)\..+")


def quantize_modules_(model: nn.Module, scheme: Scheme, group_size: int | None = None) -> None:
    """Replace the linears of all decoder layers by quantized ones in the packed layout of the file, without values yet.

    They are on the devices of those they replace, `meta` too. Next come `to_empty`, values for `weight` (fp8) or
    `weight_packed`, for `weight_scale` and for `weight_global_scale` (nvfp4), and then `use_kernels_`.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and LINEAR_NAME.fullmatch(name):
            options: dict[str, Any] = {"device": module.weight.device}
            if scheme == "int4" and group_size is not None:
                options["group_size"] = group_size
            model.set_submodule(name, LAYERS[scheme](module.in_features, module.out_features, **options))


def use_kernels_(model: nn.Module) -> None:
    """Bring the weights of a loaded model into the kernel layout, one by one, where there is a kernel.

    Weights that are offloaded, and come to their device only to be used, are on `meta`, which has none: they stay.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.after_loading_()


@register_quantization_config(LOADED_METHOD)
class LoadedQuantization(QuantizationConfigMixin):
    """The `quantization_config` of a loaded model, which says in files what the one it was loaded from said."""

    def __init__(self, **settings: Any) -> None:
        self.quant_method = LOADED_METHOD  # type: ignore[assignment]  # any registered name will do
        self.settings = settings | {"quant_method": QUANT_METHOD}

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.settings)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


@register_quantizer(LOADED_METHOD)
class Quantizer(QuantizerHook):
    """What transformers asks when it loads or saves a model with the linears of this module."""

    def prepare(self, model: PreTrainedModel) -> None:
        quantization = quantization_of(self.quantization_config.to_dict())
        assert quantization is not None
        quantize_modules_(model, *quantization)
        # The shape is known.
        ignore_unexpected_keys(model, r"\.weight_shape$")

    def finish(self, model: PreTrainedModel) -> None:
        use_kernels_(model)

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
        is_offloaded = any(tensor.is_meta for linear in linears.values() for tensor in linear.parameters())
        if is_sharded(model) or is_offloaded:
            raise ValueError(
                "a quantized model that is offloaded or sharded over ranks cannot be saved; copy the folder it was "
                "loaded from, or load it in one process without offload"
            )
        parts = {
            f"{name}.{part}": tensor
            for name, linear in linears.items()
            for part, tensor in linear.file_tensors().items()
        }
        return model.state_dict() | parts, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def config_for_loading(
    model_class: type[PreTrainedModel],
    source: Any,
    config: PreTrainedConfig | str | os.PathLike[str] | None,
    options: dict[str, Any],
) -> PreTrainedConfig | str | os.PathLike[str] | None:
    """The config with which transformers loads `source` by these linears, or `config` if it is not quantized as here.

    What `options`, those of `from_pretrained`, say of the config is taken from them, as transformers does. With a
    `quantization_config` among them, loading is transformers' own, such as to BF16 with `dequantize`.

    Raises:
        MissingLibraryError: transformers' own quantizer, and compressed-tensors is not installed.
        CheckpointError: a quantization that transformers does not know; it would take the codes for weights.
    """
    if source is None or options.get("gguf_file"):
        return config
    content: dict[str, Any] = {}
    config_class: Any = model_class.config_class
    if isinstance(config, PreTrainedConfig):
        settings = getattr(config, "quantization_config", None)
    else:
        file_options = {name: options[name] for name in OPTIONS_OF_FILES if name in options}
        content, _ = config_class.get_config_dict(source if config is None else config, **file_options)
        settings = content.get("quantization_config")
    is_ours = quantization_of(settings) is not None and options.get("quantization_config") is None
    if not is_ours:
        method = settings.get("quant_method") if isinstance(settings, Mapping) else None
        if isinstance(settings, Mapping) and not _is_known(settings):
            raise CheckpointError(
                f"{source}: quantization {method!r}: transformers has none of this name and would take the codes for "
                "weights; load the checkpoint with the engine it was made for"
            )
        if method == QUANT_METHOD and find_spec("compressed_tensors") is None:
            raise MissingLibraryError(
                f"{source}: loading it this way needs compressed-tensors; "
                "pip install 'modeling-mistral-large[quantized]'"
            )
        return config
    if isinstance(config, PreTrainedConfig):
        loaded = copy.deepcopy(config)
    else:
        names = {*content, *config_class.__dataclass_fields__} - {"dtype", "quantization_config"}
        loaded = config_class.from_dict(content, **{name: options.pop(name) for name in names & options.keys()})
    assert isinstance(settings, Mapping)
    loaded.quantization_config = {**settings, "quant_method": LOADED_METHOD}
    return loaded


def _is_known(settings: Mapping[str, Any]) -> bool:
    # bitsandbytes of old has no method in the file.
    return bool(settings.get("load_in_8bit") or settings.get("load_in_4bit")) or (
        settings.get("quant_method") in AUTO_QUANTIZATION_CONFIG_MAPPING
    )


def refuse_unquantized(model: PreTrainedModel, source: Any, unexpected: Iterable[str], missing: Iterable[str]) -> None:
    """Check after loading that a model that was to be quantized is, and that none of its linear layers lost a tensor.

    `unexpected` are the names of the checkpoint's tensors that have no place in the model, `missing` those of the
    model's that are not in the checkpoint.

    Raises:
        CheckpointError: every linear layer is as large as without the quantization; or a linear layer has more in the
            checkpoint than its weight, such as scales or a bias, or than what its quantization looks for.
    """
    linears = {name: module for name, module in model.named_modules() if LINEAR_NAME.fullmatch(name)}
    # A head calls the decoder's tensors by another prefix.
    names = {name[name.index("layers.") :] for name in linears}
    lost, absent = (
        sorted(key for key in keys if (part := LINEAR_PART.fullmatch(key)) and part[1] in names)
        for keys in (unexpected, missing)
    )
    # A quantization may leave a tensor of the file unused, but not have made up another. The attribute stays where one
    # has dequantized its weights and gone.
    if lost and (absent or not hasattr(model, "is_quantized")):
        raise CheckpointError(
            f"{source}: {len(lost)} tensors of linear layers have no place in the model, such as {lost[0]}: they "
            "belong to a quantization that config.json does not name, or to another architecture; use the "
            "checkpoint's own config.json, or the engine it was made for"
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or getattr(quantizer.quantization_config, "dequantize", False):
        return
    if all(map(_is_plain, linears.values())):
        method = quantizer.quantization_config.quant_method
        raise CheckpointError(
            f"{source}: quantization {getattr(method, 'value', method)!r} left every linear layer of the decoder as it "
            "was; look at the modules that its config leaves out, or load without a quantization_config"
        )


def _is_plain(module: nn.Module) -> bool:
    """Whether a linear layer is what the model class makes: compressed-tensors, for one, only adds a scheme to it."""
    if type(module) is not nn.Linear or any(name not in PLAIN and name[0] != "_" for name in vars(module)):
        return False
    # torchao and others replace the tensor and leave the module.
    return type(module.weight.data) is Tensor and module.weight.dtype.is_floating_point and module.weight.itemsize > 1


# The attributes of an untouched layer.
PLAIN = frozenset(vars(nn.Linear(1, 1, bias=False, device="meta")))
