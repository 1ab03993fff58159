"""Adapters of PEFT: its defaults for our model type, and folders with an adapter on a base of either layout."""

import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralForCausalLM

import modeling_mistral_large
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_adapter, convert_checkpoint, verify_checkpoint
from mistral_large_conversion.checkpoint.hub import resolve_source
from mistral_large_conversion.errors import CheckpointError, MissingLibraryError
from mistral_large_conversion.retag import retag_checkpoint
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.adapter_loading import adapter_base, load_on_base
from tests.support.adapters import write_vendors_adapter
from tests.support.errors import raises_exactly, whole
from tests.support.models import stock_and_ours
from tests.support.warm_python import WarmPython

ROOT = Path(__file__).parents[2]
IDS = torch.arange(1027, 1036)[None]
Train: TypeAlias = Callable[[Path, Path], Tensor]
# Those of PEFT's methods that have defaults for Mistral and take nothing but a rank or nothing at all.
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: peft.LoraConfig(task_type="CAUSAL_LM", r=2),
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "LoHa": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=2),
    "LoKr": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", r=2),
    "VeRA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=2),
    "LN tuning": lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}


def trainable(model: Any, config: Any) -> dict[str, tuple[int, ...]]:
    model = peft.get_peft_model(model, config)
    return {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=() if name in ("LoRA", "IA3") else pytest.mark.slow) for name in METHODS]
)
def test_peft_trains_what_it_trains_of_mistral(method: str, tiny_config: MistralLargeConfig) -> None:
    tiny_config.num_key_value_heads = 6
    stock, ours = stock_and_ours(tiny_config, "eager")
    expected = trainable(stock, METHODS[method]())
    assert expected
    assert trainable(ours, METHODS[method]()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "table", [name for name in dir(peft.utils.constants) if name.startswith("TRANSFORMERS_MODELS_TO")]
)
def test_each_table_of_peft_has_for_us_what_it_has_for_mistral(table: str) -> None:
    # What PEFT does before it looks them up; it may have been imported after us.
    MistralLargeConfig().to_dict()
    defaults = getattr(peft.utils.constants, table)
    assert defaults.get("mistral_large") == defaults.get("mistral")


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import peft, modeling_mistral_large as m; model = make(m)",
        "import modeling_mistral_large as m; model = make(m); import peft",
    ],
)
def test_peft_may_be_imported_before_or_after(imports: str, warm_python: WarmPython) -> None:
    code = f"""
sizes = dict(vocab_size=400, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4)
make = lambda package: package.MistralLargeForCausalLM(package.MistralLargeConfig(**sizes))
{imports}
print(sum(value.requires_grad for value in peft.get_peft_model(model, peft.LoraConfig()).parameters()))
"""
    command = [warm_python.python, "-c", code]
    done = subprocess.run(command, env=warm_python.environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> dict[str, Path]:
    return {
        "consolidated": assemble_demo_checkpoint(tmp_path_factory.mktemp("base") / "consolidated"),
        "hf": shutil.copytree(demo_folder, tmp_path_factory.mktemp("base") / "hf"),
    }


@pytest.fixture(params=["consolidated", "hf"])
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[Path, Tensor]]:
    """The adapter of a base with random values, made when it is first asked for, and its logits."""

    @cache
    def adapter(base: Path) -> tuple[Path, Tensor]:
        torch.manual_seed(20240724)
        folder = tmp_path_factory.mktemp("adapter")
        model: Any = MistralLargeForCausalLM.from_pretrained(base, dtype=torch.float32)
        without: Tensor = model(IDS).logits
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False)
        adapted: Any = peft.get_peft_model(model, config).eval()
        adapted.save_pretrained(folder)
        logits: Tensor = adapted(IDS).logits
        assert not torch.equal(logits, without)
        return folder, logits

    return adapter


@pytest.fixture
def train(trained: Callable[[Path], tuple[Path, Tensor]]) -> Train:
    """What puts the adapter of a base into a folder, and returns its logits."""

    def into(base: Path, folder: Path) -> Tensor:
        adapter, logits = trained(base)
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        return logits

    return into


@pytest.mark.slow
@pytest.mark.parametrize(
    "load",
    [
        MistralLargeForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        peft.AutoPeftModelForCausalLM.from_pretrained,
    ],
)
def test_an_adapter_is_loaded_on_its_base(train: Train, load: Callable[..., Any], base: Path, tmp_path: Path) -> None:
    expected = train(base, tmp_path / "adapter")
    assert torch.equal(load(tmp_path / "adapter", dtype=torch.float32).eval()(IDS).logits, expected)


@pytest.mark.slow
def test_options_of_the_adapter_and_of_the_base(train: Train, base: Path, tmp_path: Path) -> None:
    expected = train(base, tmp_path / "adapters" / "first")
    model, info = MistralLargeForCausalLM.from_pretrained(
        tmp_path / "adapters", subfolder="first", dtype=torch.float32, adapter_name="mine", output_loading_info=True
    )
    assert torch.equal(model(IDS).logits, expected)
    assert list(model.peft_config) == ["mine"]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = MistralLargeTokenizer.from_pretrained(tmp_path / "adapters", subfolder="first")
    assert tokenizer.encode("Hello") == [1, 23325]


@pytest.mark.slow
def test_an_adapter_beside_a_checkpoint_is_loaded_with_it(train: Train, base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "both")
    expected = train(base, folder)
    assert adapter_base(folder, {}) in (None, str(base))
    assert torch.equal(MistralLargeForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits, expected)


@pytest.mark.slow
def test_stock_mistral_gives_the_same_logits(train: Train, bases: dict[str, Path], tmp_path: Path) -> None:
    expected = train(bases["hf"], tmp_path / "adapter")
    convert_checkpoint(bases["consolidated"], tmp_path / "stock", model_type="mistral")
    stock: Any = MistralForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    stock = peft.PeftModel.from_pretrained(stock, tmp_path / "adapter").eval()
    assert torch.equal(stock(IDS).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "take",
    [
        resolve_source,
        verify_checkpoint,
        lambda folder: convert_checkpoint(folder, folder / "out"),
        lambda folder: retag_checkpoint(folder, "mistral"),
        MistralLargeConfig.from_pretrained,
    ],
)
def test_what_needs_a_checkpoint_says_that_it_is_an_adapter(
    train: Train, take: Callable[[Any], Any], base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    train(base, folder)
    with pytest.raises(CheckpointError) as error:
        take(folder)
    assert str(error.value) == (
        f"{folder}: an adapter (PEFT) of the base {str(base)!r}, not a checkpoint; merge it with "
        f"`mistral-large convert BASE DESTINATION --adapter {folder}`, and give that destination; chat and serve take "
        "BASE with --adapter"
    )


NAMES_NONE = (
    ": an adapter whose adapter_config.json names no base_model_name_or_path; load the base model, then "
    "peft.PeftModel.from_pretrained(model, folder)"
)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", NAMES_NONE),
        ('{"base_model_name_or_path": null}', NAMES_NONE),
        ("[]", "/adapter_config.json: must be a JSON object, not list; save or download it again"),
        ("{", "/adapter_config.json: Expecting <*>; save or download it again"),
        ('{"base_model_name_or_path": 3}', NAMES_NONE),
    ],
)
def test_an_adapter_without_a_base_is_one_line(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    for take in (MistralLargeForCausalLM.from_pretrained, MistralLargeTokenizer.from_pretrained):
        with pytest.raises(CheckpointError, match=whole(f"{tmp_path}{problem}")):
            take(tmp_path)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}: an adapter (PEFT) of a base that it does not name, not a checkpoint; merge it with "
        "`mistral-large "
        f"convert BASE DESTINATION --adapter {tmp_path}`, and give that destination; chat and serve take BASE with "
        "--adapter",
    ):
        resolve_source(tmp_path)


def test_a_base_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/no/such/base"}')
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}: an adapter for '/no/such/base', which is no folder here; load the base model from where it "
        "is, then peft.PeftModel.from_pretrained(model, folder)",
    ):
        MistralLargeForCausalLM.from_pretrained(tmp_path)


def test_an_adapter_needs_peft(
    train: Train, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(bases["hf"], tmp_path)
    monkeypatch.setattr("modeling_mistral_large.adapter_loading.find_spec", lambda _: None)
    with raises_exactly(MissingLibraryError, f"{tmp_path}: has an adapter, which needs PEFT; pip install peft"):
        MistralLargeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_the_chat_says_that_it_uses_an_adapter(
    train: Train, base: Path, tmp_path: Path, warm_python: WarmPython
) -> None:
    train(base, tmp_path / "adapter")
    command = [
        warm_python.python,
        "-m",
        "mistral_large_cli",
        "chat",
        str(tmp_path / "adapter"),
        "--max-new-tokens",
        "2",
    ]
    environment = warm_python.environment
    done = subprocess.run(command, input="Hello\n", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'adapter'}: an adapter, loaded on {base}\n" in done.stderr


@pytest.mark.slow
def test_an_adapter_of_either_format_is_loaded_on_a_base_of_either_layout(
    train: Train, base: Path, tmp_path: Path
) -> None:
    expected = train(base, tmp_path / "peft")
    convert_adapter(tmp_path / "peft", tmp_path / "vendors", to="consolidated")
    for name in ("peft", "vendors"):
        model = load_on_base(MistralLargeForCausalLM, base, tmp_path / name, dtype=torch.float32)
        assert torch.equal(model.eval()(IDS).logits, expected)
    model, info = load_on_base(
        MistralLargeForCausalLM, base, tmp_path / "vendors", adapter_name="mine", output_loading_info=True
    )
    assert list(model.peft_config) == ["mine"]
    assert not info["missing_keys"]
    # The folder itself is the way to say that the adapter next to a checkpoint is meant.
    both = shutil.copytree(base, tmp_path / "both")
    for path in (tmp_path / "peft").iterdir():
        shutil.copy(path, both / path.name)
    model = load_on_base(MistralLargeForCausalLM, both, both, dtype=torch.float32)
    assert torch.equal(model.eval()(IDS).logits, expected)


@pytest.mark.slow
def test_two_adapters_are_refused_before_anything_is_loaded(
    train: Train, bases: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("first", "second"):
        train(bases["hf"], tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        load_on_base(MistralLargeForCausalLM, tmp_path / "first", tmp_path / "second")
    assert str(error.value) == (
        f"{tmp_path / 'first'}: has an adapter of its own, and {tmp_path / 'second'} is another: one is loaded; give "
        "the base alone, or leave the other adapter out"
    )


@pytest.mark.slow
def test_an_adapter_that_does_not_fit_the_base_is_refused(
    bases: dict[str, Path], tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    write_vendors_adapter(tmp_path / "vendors", tiny_config)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/vendors is not an adapter that can be read; nothing was done, fix or download it again:\n"
        "  params.json: vocab_size is 768, the base has 32768\n"
        "  params.json: hidden_size is 80, the base has 64\n"
        "  params.json: intermediate_size is 112, the base has 256",
    ):
        load_on_base(MistralLargeForCausalLM, bases["hf"], tmp_path / "vendors")
    convert_adapter(tmp_path / "vendors", tmp_path / "peft", to="hf")
    problem = (
        f"{tmp_path}/peft is not an adapter that can be read; nothing was done, fix or download it again:\n"
        "  tensor 'base_model.model.model.layers.0.mlp.down_proj.lora_A.weight' has shape [4, 112], the weight of "
        "the base [64, 256]\n<*>"
    )
    with pytest.raises(CheckpointError, match=whole(problem)):
        load_on_base(MistralLargeForCausalLM, bases["hf"], tmp_path / "peft")
    with raises_exactly(
        CheckpointError,
        f"{bases['consolidated']}: no adapter; give a folder with adapter_config.json and adapter_model.safetensors "
        "(PEFT), or with lora.safetensors and params.json (the vendor's)",
    ):
        load_on_base(MistralLargeForCausalLM, bases["hf"], bases["consolidated"])


@pytest.mark.slow
def test_the_vendors_file_next_to_a_checkpoint_is_not_passed_over(
    bases: dict[str, Path], tiny_config: MistralLargeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_vendors_adapter(tmp_path / "vendors", tiny_config)
    # Nothing is read for it.
    monkeypatch.setattr("safetensors.safe_open", None)
    for layout, base in bases.items():
        folder = shutil.copytree(base, tmp_path / layout)
        shutil.copy(tmp_path / "vendors" / "lora.safetensors", folder)
        for load_it in (MistralLargeForCausalLM.from_pretrained, modeling_mistral_large.load):
            with raises_exactly(
                CheckpointError,
                f"{folder}: holds lora.safetensors next to the checkpoint, which would be left out; move it with the "
                "params.json of its training into a folder of its own, and give that as the adapter",
            ):
                load_it(folder)
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/vendors: an adapter (lora.safetensors) of a base that it does not name, not a checkpoint; "
        f"merge it with `mistral-large convert BASE DESTINATION --adapter {tmp_path}/vendors`, and give that "
        "destination; chat and serve take BASE with --adapter",
    ):
        MistralLargeForCausalLM.from_pretrained(tmp_path / "vendors")
