"""transformers' own quantizations give our model the layers and bytes they give stock Mistral, or the same error."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MistralForCausalLM

from mistral_large_conversion.errors import CheckpointError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeModel
from tests.support.checkpoints import write_consolidated
from tests.support.errors import raises_exactly, whole
from tests.support.models import stock_config

# Every size is a multiple of the groups and blocks that the quantizers know.
CONFIG: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
}
LAYOUTS = ["hf", "consolidated"]
NOTHING_LEFT = "left every linear layer of the decoder as it was"


@pytest.fixture(autouse=True)
def _kernels_of_quanto(request: pytest.FixtureRequest) -> None:
    """Compile quanto's kernels by the fixture, which knows that only one process of ours does."""
    if "quanto" in request.node.name:
        request.getfixturevalue("quanto_kernels")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same random weights in bf16: ours in both layouts, and stock Mistral's."""
    base = tmp_path_factory.mktemp("quantizers")
    config = MistralLargeConfig(**CONFIG)
    write_consolidated(base / "consolidated", config, torch.bfloat16)
    ours: Any = MistralLargeForCausalLM.from_pretrained(base / "consolidated", dtype="bfloat16")
    ours.save_pretrained(base / "hf")
    stock: Any = MistralForCausalLM._from_config(stock_config(config), dtype=torch.bfloat16)
    stock.load_state_dict(ours.state_dict())
    stock.save_pretrained(base / "stock")
    return {name: base / name for name in ("consolidated", "hf", "stock")}


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return transformers.BitsAndBytesConfig(**options)


def torchao(name: str, **options: Any) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return transformers.TorchAoConfig(getattr(quantization, name)(), **options)


def hqq(**options: Any) -> Any:
    pytest.importorskip("hqq", reason="hqq is not installed")
    return transformers.HqqConfig(nbits=4, group_size=64, **options)


def quanto(**options: Any) -> Any:
    pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    return transformers.QuantoConfig(**options)


CONFIGS: dict[str, Callable[[], Any]] = {
    "bitsandbytes, 4 bits": lambda: bitsandbytes(load_in_4bit=True),
    "bitsandbytes, nf4 twice": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes, 8 bits": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes, some": lambda: bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "q_proj"]),
    "torchao, int8": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao, int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao, fp8": lambda: torchao("Float8WeightOnlyConfig"),
    "hqq": hqq,
    "quanto, int8": lambda: quanto(weights="int8"),
    "quanto, int4": lambda: quanto(weights="int4"),
    "quanto, float8": lambda: quanto(weights="float8"),
    "fine-grained FP8": lambda: transformers.FineGrainedFP8Config(),
    "eetq": lambda: transformers.EetqConfig(),
    "fbgemm": lambda: transformers.FbgemmFp8Config(),
    "higgs": lambda: transformers.HiggsConfig(),
    "gptq": lambda: transformers.GPTQConfig(bits=4),
}


def plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a tensor subclass such as torchao's is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{part}", getattr(tensor, part))
    else:
        yield name, tensor.data


def made_of(model: nn.Module) -> tuple[dict[str, str], dict[str, tuple[Any, ...]]]:
    """The type of every module but those of the architecture itself, and the bytes of every tensor."""
    types = {
        name: type(module).__name__.replace("MistralLarge", "Mistral")
        for name, module in model.named_modules()
        # Stock has a module for silu.
        if not name.endswith(".act_fn")
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bits = {
        part: (tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for name, each in tensors
        for part, tensor in plain_tensors(name, each)
    }
    return types, bits


def outcome(model_class: Any, folder: Path, **options: Any) -> Any:
    """What a loaded model is made of, or the error, in which neither the class nor the folder is named."""
    try:
        model = model_class.from_pretrained(folder, dtype="bfloat16", **options)
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        return type(error), str(error).replace(str(folder), "").replace("MistralLarge", "Mistral")
    return made_of(model)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantizer_gives_the_layers_and_bytes_of_stock_mistral(
    folders: dict[str, Path], name: str, layout: str
) -> None:
    expected = outcome(MistralForCausalLM, folders["stock"], quantization_config=CONFIGS[name]())
    found = outcome(MistralLargeForCausalLM, folders[layout], quantization_config=CONFIGS[name]())
    assert found == expected
    if isinstance(expected[0], dict):
        assert expected[1] != made_of(MistralForCausalLM.from_pretrained(folders["stock"], dtype="bfloat16"))[1]


SKIPPING: dict[str, Callable[[], Any]] = {
    "bitsandbytes": lambda: bitsandbytes(load_in_4bit=True, llm_int8_skip_modules=["model"]),
    "bitsandbytes, 8 bits": lambda: bitsandbytes(load_in_8bit=True, llm_int8_skip_modules=["model"]),
    "torchao": lambda: torchao("Int8WeightOnlyConfig", modules_to_not_convert=["model"]),
    "quanto": lambda: quanto(weights="int8", modules_to_not_convert=["model"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SKIPPING)
def test_a_quantization_that_leaves_every_layer_out_is_an_error(
    folders: dict[str, Path], name: str, layout: str
) -> None:
    problem = (
        f"{folders[layout]}: quantization '<*>' {NOTHING_LEFT}; look at the modules that its config leaves out, or "
        "load without a quantization_config"
    )
    with pytest.raises(CheckpointError, match=whole(problem)):
        MistralLargeForCausalLM.from_pretrained(folders[layout], quantization_config=SKIPPING[name]())


def quantized_folder(folders: dict[str, Path], kind: str, folder: Path, settings: dict[str, Any]) -> Path:
    """A folder whose config.json names a quantization."""
    folder.mkdir()
    for path in folders[kind].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


OTHERS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "nvfp4": {"quant_method": "nvfp4"},
    "aqlm": {"quant_method": "aqlm"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_folder_quantized_otherwise_loads_or_fails_as_stock_does(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    stock = outcome(MistralForCausalLM, quantized_folder(folders, "stock", tmp_path / "stock", OTHERS[name]))
    ours = outcome(MistralLargeForCausalLM, quantized_folder(folders, "hf", tmp_path / "ours", OTHERS[name]))
    assert ours == stock


@pytest.mark.parametrize("as_config", [False, True])
@pytest.mark.parametrize("method", ["modelopt", "exl2"])
def test_a_quantization_that_transformers_does_not_know_is_refused_by_name(
    folders: dict[str, Path], method: str, as_config: bool, tmp_path: Path
) -> None:
    folder = quantized_folder(folders, "hf", tmp_path / "ours", {"quant_method": method})
    config = MistralLargeConfig.from_pretrained(folder) if as_config else None
    with pytest.raises(CheckpointError) as error:
        MistralLargeForCausalLM.from_pretrained(folder, config=config)
    assert str(error.value) == (
        f"{folder}: quantization {method!r}: transformers has none of this name and would take the codes for weights; "
        "load the checkpoint with the engine it was made for"
    )


def int8_rows(weight: Tensor) -> dict[str, Tensor]:
    scale = weight.abs().amax(-1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def fp8_blocks(weight: Tensor) -> dict[str, Tensor]:
    rows, columns = (-(-size // 128) for size in weight.shape)
    return {"weight": weight.to(torch.float8_e4m3fn), "weight_scale_inv": torch.rand(rows, columns) + 0.5}


INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT8_WEIGHTS = {**INT8, "strategy": "channel", "dynamic": False}
INT8_ACTIVATIONS = {**INT8, "strategy": "token", "dynamic": True}
STORED: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]] = {
    "int8 of compressed-tensors": (
        int8_rows,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": INT8_WEIGHTS, "input_activations": INT8_ACTIVATIONS}
            },
        },
    ),
    # As DeepSeek's: on a CPU transformers dequantizes it to bf16.
    "FP8 in blocks": (
        fp8_blocks,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_weights_stored_in_formats_of_others_load_as_in_stock_mistral(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    quantize, settings = STORED[name]
    models = []
    for kind, model_class in (("stock", MistralForCausalLM), ("hf", MistralLargeForCausalLM)):
        folder = quantized_folder(folders, kind, tmp_path / kind, settings)
        tensors = load_file(folder / "model.safetensors")
        torch.manual_seed(0)
        for key in [key for key in tensors if key.endswith("_proj.weight")]:
            parts = quantize(tensors.pop(key))
            tensors |= {f"{key.removesuffix('weight')}{part}": tensor for part, tensor in parts.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        models.append(model_class.from_pretrained(folder, dtype="bfloat16"))
    assert made_of(models[1]) == made_of(models[0])
    with torch.no_grad():
        stock, ours = (model(torch.tensor([[1, 3, 5, 7]])).logits for model in models)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize(
    "model_class", [MistralLargeForCausalLM, pytest.param(MistralLargeModel, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("part", ["weight_scale", "weight_scale_inv", "qzeros", "bias", "base_layer.weight"])
def test_tensors_of_a_linear_layer_that_have_no_place_are_an_error(
    folders: dict[str, Path], part: str, model_class: Any, tmp_path: Path
) -> None:
    """As in a quantized folder with another config.json: the codes would be taken for weights."""
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_bytes((folders["hf"] / "config.json").read_bytes())
    tensors = load_file(folders["hf"] / "model.safetensors")
    lost = f"model.layers.1.mlp.up_proj.{part}"
    save_file({**tensors, lost: torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with raises_exactly(
        CheckpointError,
        f"{folder}: 1 tensors of linear layers have no place in the model, such as {lost}: they belong to a "
        "quantization that config.json does not name, or to another architecture; use the checkpoint's own "
        "config.json, or the engine it was made for",
    ):
        model_class.from_pretrained(folder)


def test_fewer_layers_than_the_checkpoint_has_can_be_asked_for(folders: dict[str, Path]) -> None:
    model = MistralLargeForCausalLM.from_pretrained(folders["hf"], num_hidden_layers=1)
    assert len(model.model.layers) == 1


def test_the_loading_info_is_returned_to_who_asks_for_it(folders: dict[str, Path]) -> None:
    for layout in LAYOUTS:
        model, info = MistralLargeForCausalLM.from_pretrained(folders[layout], output_loading_info=True)
        assert type(model) is MistralLargeForCausalLM
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]
