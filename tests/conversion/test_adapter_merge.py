"""LoRA merged while a checkpoint streams, against PEFT's merge, and adapters between PEFT's format and the vendor's."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mistral_large_conversion.stream as stream_module
from mistral_large_conversion import (
    convert_adapter,
    convert_checkpoint,
    plan_conversion,
    planned_tensor,
    read_manifest,
    verify_checkpoint,
)
from mistral_large_conversion.checkpoint.adapter import read_adapter
from mistral_large_conversion.checkpoint.geometry import Geometry
from mistral_large_conversion.destination import UNFINISHED_NAME
from mistral_large_conversion.errors import CheckpointError, DestinationError, SettingError
from mistral_large_conversion.merge import MergeLora
from mistral_large_conversion.planned_tensor import transformed
from modeling_mistral_large import MistralLargeConfig
from tests.support.adapters import merged_by_peft, save_peft_adapter, write_vendors_adapter
from tests.support.checkpoints import contents, tokenizer_model_file, write_consolidated
from tests.support.edits import Edit, remove, set_json
from tests.support.errors import raises_exactly, whole
from tests.support.peak_memory import PeakMemory
from tests.support.warm_python import WarmPython

pytestmark = pytest.mark.slow

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def base(small_source: Path) -> Path:
    return small_source


@pytest.fixture(scope="module")
def saved_by_peft(tiny_geometry: Geometry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter and the base it was made on, which is as large as any other base here."""
    folder = tmp_path_factory.mktemp("saved_by_peft")
    torch.manual_seed(1)
    write_consolidated(folder / "base", tiny_geometry, torch.bfloat16)
    save_peft_adapter(folder / "base", folder / "adapter")
    return folder


@pytest.fixture
def adapter(base: Path, saved_by_peft: Path, tmp_path: Path) -> Path:
    """The adapter of a test, which names the test's own base."""
    folder = Path(shutil.copytree(saved_by_peft / "adapter", tmp_path / "adapter"))
    set_json(folder / "adapter_config.json", base_model_name_or_path=str(base))
    return folder


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing
    assert {tensor.dtype for tensor in found.values()} == {tensor.dtype for tensor in expected.values()}


@pytest.mark.parametrize("lora_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_peft(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None, dtype: str, lora_dtype: torch.dtype | None
) -> None:
    source, adapter = tmp_path / "source", tmp_path / "adapter"
    write_consolidated(source, tiny_config, DTYPES[dtype])
    save_peft_adapter(source, adapter, dtype=lora_dtype)
    expected = merged_by_peft(source, adapter, DTYPES[dtype])
    before = contents(source), contents(adapter)
    convert_checkpoint(source, tmp_path / "hf", adapter=adapter)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    assert (contents(source), contents(adapter)) == before
    # From the HF layout, the same values in the other order.
    convert_checkpoint(source, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    convert_checkpoint(tmp_path / "base", tmp_path / "merged", to="consolidated", adapter=adapter)
    convert_checkpoint(tmp_path / "hf", tmp_path / "expected", to="consolidated")
    assert_same(*(load_file(tmp_path / name / "consolidated.safetensors") for name in ("merged", "expected")))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 7, "layers.1.mlp.up_proj": 1}, "alpha_pattern": {"o_proj": 3, "q_proj": 0.3}},
        {"use_rslora": True, "rank_pattern": {r"layers\.[02]\..*down_proj": 5}},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.(0|1)\..*_proj", "exclude_modules": ["o_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
        {"lora_alpha": 0.7, "r": 3, "lora_dropout": 0.5},
        {"init_lora_weights": "gaussian", "r": 130},
    ],
    ids=str,
)
def test_settings_that_change_the_merge_are_peft_s(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    kind = settings.pop("init_lora_weights", None)
    save_peft_adapter(base, tmp_path / "adapter", **settings)
    if kind is not None:
        edit(tmp_path / "adapter", init_lora_weights=kind)
    convert_checkpoint(base, tmp_path / "hf", adapter=tmp_path / "adapter")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert_same(found, merged_by_peft(base, tmp_path / "adapter", torch.bfloat16))
    convert_checkpoint(base, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    changed = {name for name in plain if not torch.equal(plain[name], found[name])}
    assert changed == {*read_adapter(tmp_path / "adapter", plan_conversion(base).geometry).pairs}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_another_dtype_is_that_in_which_peft_loads_the_base(
    base: Path, adapter: Path, tmp_path: Path, dtype: Any
) -> None:
    convert_checkpoint(base, tmp_path / "hf", adapter=adapter, dtype=dtype)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), merged_by_peft(base, adapter, DTYPES[dtype]))
    assert all(
        check.is_ok for check in verify_checkpoint(tmp_path / "hf", base, adapter=adapter) if check.name == "tensors"
    )


@pytest.mark.parametrize(("scheme", "count"), [("fp8", 51), ("int4", 72), ("nvfp4", 72)])
def test_quantized_codes_are_those_of_the_merged_weights(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None, scheme: Any, count: int
) -> None:
    tiny_config.hidden_size, tiny_config.intermediate_size = 128, 256
    source, adapter = tmp_path / "source", tmp_path / "adapter"
    write_consolidated(source, tiny_config, torch.bfloat16)
    save_peft_adapter(source, adapter)
    convert_checkpoint(source, tmp_path / "merged", adapter=adapter)
    (tmp_path / "merged" / "tokenizer.model.v3").write_bytes((source / "tokenizer.model.v3").read_bytes())
    convert_checkpoint(tmp_path / "merged", tmp_path / "expected", quantize=scheme)
    convert_checkpoint(source, tmp_path / "found", quantize=scheme, adapter=adapter)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("found", "expected")))
    (check,) = (c for c in verify_checkpoint(tmp_path / "found", source, adapter=adapter) if c.name == "tensors")
    assert (check.is_ok, check.detail) == (
        True,
        f"all {count} have the source's bits with the adapter merged, quantized to {scheme}",
    )


@pytest.mark.parametrize("block_bytes", [1, 997, 5_000, 2**14])
@pytest.mark.parametrize("rows", [1, 129, 300])
def test_the_bits_do_not_depend_on_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, rows: int
) -> None:
    weight, down, up = torch.randn(rows, 80), torch.randn(16, 80), torch.randn(rows, 16)
    save_file({"w": weight, "a": down, "b": up}, tmp_path / "x.safetensors")
    merge = merge_of(tmp_path / "x.safetensors", scaling=0.3)
    expected = weight.clone()
    expected += (up @ down) * 0.3
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", block_bytes)
    blocks = [block.copy() for (block,) in transformed(merge)]
    found = torch.cat([torch.from_numpy(block).view(torch.float32) for block in blocks])
    assert torch.equal(found, expected)


def merge_of(file: Path, scaling: float) -> Any:
    """The way of tensor w with LoRA a and b in a file."""
    from mistral_large_conversion.checkpoint.adapter import LoraPair
    from mistral_large_conversion.checkpoint.safetensors_header import read_header
    from mistral_large_conversion.planned_tensor import PlannedTensor

    stored = {tensor.name: tensor for tensor in read_header(file)[0]}
    step = MergeLora(LoraPair(stored["a"], stored["b"], scaling), stored["w"].dtype)
    return PlannedTensor(stored["w"], (step,), (stored["w"],))


def test_memory_does_not_grow_with_the_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = 8_000, 500
    save_file(
        {"w": torch.randn(rows, columns), "a": torch.randn(2, columns), "b": torch.randn(rows, 2)},
        tmp_path / "x.safetensors",
    )
    merge = merge_of(tmp_path / "x.safetensors", scaling=2.0)
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 2**16)
    with PeakMemory() as memory:
        for _ in transformed(merge):
            pass
    assert 0 < memory.peak < rows * columns * 4 / 10


def test_a_value_that_becomes_infinite_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][5] = 1e38
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    problem = whole(
        "tensor 'layers.1.feed_forward.w3.weight' becomes <*> with the adapter; choose a dtype with a larger range, or "
        "another adapter"
    ).replace(".+", "-?(inf|nan)")
    with pytest.raises(CheckpointError, match=problem):
        convert_checkpoint(base, tmp_path / "hf", adapter=adapter, dtype="fp16")


def edit(folder: Path, **settings: Any) -> None:
    path = folder / ("adapter_config.json" if (folder / "adapter_config.json").exists() else "params.json")
    set_json(path, **settings)


def edit_lora(**settings: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        lora = json.loads((folder / "params.json").read_text())["lora"]
        edit(folder, lora={**lora, **settings})

    return change


def config(**settings: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, **settings)


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def of_folder(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        weights = load_file(path)
        change(weights)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})

    return of_folder


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"
MERGE = "merge it with PEFT's merge_and_unload() and convert what that returns"
WITHOUT = f": only an adapter without it is read; {MERGE}"
UNREADABLE = "{} is not an adapter that can be read; nothing was done, fix or download it again:\n  {}"
PEFT_DAMAGE: dict[str, tuple[Edit, str]] = {
    "DoRA": (
        config(use_dora=True),
        f"adapter_config.json: use_dora is True{WITHOUT}",
    ),
    "a bias": (config(bias="lora_only"), f"adapter_config.json: bias is 'lora_only'{WITHOUT}"),
    "a bias of LoRA": (config(lora_bias=True), f"adapter_config.json: lora_bias is True{WITHOUT}"),
    "whole modules": (
        config(modules_to_save=["lm_head"]),
        f"adapter_config.json: modules_to_save is ['lm_head']{WITHOUT}",
    ),
    "transposed": (config(fan_in_fan_out=True), f"adapter_config.json: fan_in_fan_out is True{WITHOUT}"),
    "tokens": (config(trainable_token_indices=[3]), f"adapter_config.json: trainable_token_indices is [3]{WITHOUT}"),
    "copied layers": (
        config(layer_replication=[[0, 2]]),
        f"adapter_config.json: layer_replication is [[0, 2]]{WITHOUT}",
    ),
    "a setting of later": (config(new_lora={"x": 1}), f"adapter_config.json: new_lora is {{'x': 1}}{WITHOUT}"),
    "another method": (
        config(peft_type="IA3"),
        f"adapter_config.json: peft_type is 'IA3': only 'LORA' is read; {MERGE}",
    ),
    "PiSSA": (
        config(init_lora_weights="pissa"),
        "adapter_config.json: init_lora_weights is 'pissa': it has changed the weights of the base, too; save the "
        f"adapter with path_initial_model_for_weight_conversion; or {MERGE}",
    ),
    "no rank": (config(r=0), "adapter_config.json: r is 0: must be a whole number greater than 0"),
    "a wrong alpha": (
        config(lora_alpha="16"),
        "adapter_config.json: lora_alpha is '16': must be a finite number",
    ),
    "a broken pattern": (
        config(rank_pattern={"(": 3}),
        "adapter_config.json: rank_pattern has '(': not a regular expression: <*>",
    ),
    "no targets": (
        config(target_modules=None),
        "adapter_config.json: target_modules is None: must be a list of names or a regular expression",
    ),
    "targets of another model": (
        config(target_modules=["c_attn"]),
        f"<*>\n  tensor '{FIRST}.lora_A.weight' is extra: the settings name no such linear layer\n  <*>",
    ),
    "fewer targets": (
        config(target_modules=["k_proj"]),
        f"<*>\n  tensor '{FIRST}.lora_A.weight' is extra: the settings name no such linear layer\n  <*>",
    ),
    "another rank": (
        config(r=5),
        f"tensor '{FIRST}.lora_A.weight' has shape [4, 80], rank 5 of this geometry needs [5, 80]\n  <*>",
    ),
    "another rank of a layer": (
        config(rank_pattern={"q_proj": 2}),
        f"<*>\n  tensor '{FIRST}.lora_B.weight' has shape [192, 4], rank 2 of this geometry needs [192, 2]\n  <*>",
    ),
    "a missing tensor": (
        tensors(lambda w: w.pop(f"{FIRST}.lora_B.weight")),
        f"tensor '{FIRST}.lora_B.weight' is missing: the settings name its layer",
    ),
    "another width": (
        tensors(lambda w: w.update({f"{FIRST}.lora_A.weight": torch.zeros(4, 96)})),
        f"tensor '{FIRST}.lora_A.weight' has shape [4, 96], rank 4 of this geometry needs [4, 80]",
    ),
    "another dtype": (
        tensors(lambda w: w.update({f"{FIRST}.lora_A.weight": torch.zeros(4, 80, dtype=torch.int32)})),
        f"tensor '{FIRST}.lora_A.weight' has dtype I32, must be one of F32, F16, BF16",
    ),
    "a whole embedding": (
        tensors(lambda w: w.update({"base_model.model.model.embed_tokens.weight": torch.zeros(768, 80)})),
        f"tensor 'base_model.model.model.embed_tokens.weight' is a weight that was saved whole; {MERGE}",
    ),
    "LoRA of the embedding": (
        tensors(lambda w: w.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 768)})),
        f"tensor 'base_model.model.model.embed_tokens.lora_embedding_A' is LoRA of an embedding; {MERGE}",
    ),
    "a norm": (
        tensors(lambda w: w.update({"base_model.model.model.norm.weight": torch.zeros(80)})),
        f"tensor 'base_model.model.model.norm.weight' is a norm that was trained whole; {MERGE}",
    ),
    "a magnitude": (
        tensors(lambda w: w.update({f"{FIRST}.lora_magnitude_vector": torch.zeros(192)})),
        f"tensor '{FIRST}.lora_magnitude_vector' is of DoRA; {MERGE}",
    ),
    "half a file": (
        lambda folder: os.truncate(folder / "adapter_model.safetensors", 9_000),
        "adapter_model.safetensors: is cut short: has <*> bytes, its header needs <*>",
    ),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "adapter_config.json: Expecting <*>"),
    "no weights": (
        remove("adapter_model.safetensors"),
        "adapter_model.safetensors is missing",
    ),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "only adapter_model.bin: pickles are not read; load the adapter with PEFT and save_pretrained() it again",
    ),
    "two adapters": (
        lambda folder: (folder / "lora.safetensors").write_bytes(b""),
        "holds two adapters, adapter_config.json and lora.safetensors; only one is read, put each into a folder of "
        "its own",
    ),
}


@pytest.mark.parametrize("damage", PEFT_DAMAGE)
def test_what_cannot_be_merged_exactly_is_refused_by_name(
    base: Path, adapter: Path, tmp_path: Path, damage: str
) -> None:
    spoil, problem = PEFT_DAMAGE[damage]
    spoil(adapter)
    message = f"{adapter}: {problem}" if damage == "two adapters" else UNREADABLE.format(adapter, problem)
    with pytest.raises(CheckpointError, match=whole(message)):
        convert_checkpoint(base, tmp_path / "hf", adapter=adapter)
    assert not (tmp_path / "hf").exists()


VENDORS_DAMAGE: dict[str, tuple[Edit, str]] = {
    "no settings": (
        config(lora=None),
        "params.json: lora is None: must be an object that says rank and scaling of lora.safetensors",
    ),
    "no scaling": (
        edit_lora(scaling=None),
        "params.json: lora.scaling is None: must be a finite number greater than 0",
    ),
    "another rank": (
        edit_lora(rank=8),
        "tensor 'layers.0.attention.wq.lora_A.weight' has shape [4, 80], rank 8 of this geometry needs [8, 80]\n  <*>",
    ),
    "a rank that is none": (
        edit_lora(rank=True),
        "params.json: lora.rank is True: must be a whole number greater than 0",
    ),
    "off": (
        edit_lora(enable=False),
        "params.json: lora.enable is False: the adapter is off; set it to true to have it read",
    ),
    "a setting of later": (edit_lora(alpha=3), "params.json: lora has 'alpha': unknown, it may change the result"),
    "another model": (config(rope_theta=1e4), "params.json: rope_theta is 10000.0, the base has 1000000.0"),
    "a norm": (
        tensors(lambda w: w.update({"layers.0.attention_norm.weight": torch.zeros(80)})),
        f"tensor 'layers.0.attention_norm.weight' is a norm that was trained whole; {MERGE}",
    ),
    "a missing layer": (
        tensors(lambda w: [w.pop(name) for name in list(w) if name.startswith("layers.2.")]),
        "tensor 'layers.2.attention.wk.lora_A.weight' is missing: the settings name its layer\n  <*>",
    ),
    "no params": (remove("params.json"), "params.json is missing"),
}


@pytest.mark.parametrize("damage", VENDORS_DAMAGE)
def test_an_adapter_of_the_vendor_that_is_none_is_refused_by_name(
    base: Path, tiny_config: MistralLargeConfig, tmp_path: Path, damage: str
) -> None:
    write_vendors_adapter(tmp_path / "lora", tiny_config)
    spoil, problem = VENDORS_DAMAGE[damage]
    spoil(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=whole(UNREADABLE.format(tmp_path / "lora", problem))):
        convert_checkpoint(base, tmp_path / "hf", adapter=tmp_path / "lora")
    assert not (tmp_path / "hf").exists()


def test_the_vendors_adapter_is_merged_as_in_its_own_order_of_rows(
    base: Path, tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    lora = write_vendors_adapter(tmp_path / "lora", tiny_config, scaling=1.7)
    # Merged by hand in the consolidated layout, and converted without an adapter.
    by_hand = shutil.copytree(base, tmp_path / "by_hand")
    for file in by_hand.glob("*.safetensors"):
        weights = load_file(file)
        for name in weights:
            stem = name.removesuffix("weight")
            if f"{stem}lora_A.weight" in lora:
                down, up = (lora[f"{stem}lora_{part}.weight"].float() for part in "AB")
                weights[name] += (up @ down) * 1.7
        save_file(weights, file)
    convert_checkpoint(by_hand, tmp_path / "expected")
    convert_checkpoint(base, tmp_path / "found", adapter=tmp_path / "lora")
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("found", "expected")))
    (check,) = (
        c for c in verify_checkpoint(tmp_path / "found", base, adapter=tmp_path / "lora") if c.name == "tensors"
    )
    assert (check.is_ok, check.detail) == (True, "all 30 have the source's bits with the adapter merged")


def test_manifest_and_card_say_what_was_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    import xxhash

    convert_checkpoint(base, tmp_path / "hf", adapter=adapter)
    manifest = read_manifest(tmp_path / "hf")
    assert manifest is not None
    assert manifest.adapter is not None
    checksums = {name: xxhash.xxh3_128((adapter / name).read_bytes()).hexdigest() for name in manifest.adapter.files}
    assert manifest.adapter.files == checksums
    assert (manifest.adapter.name, sorted(checksums)) == (
        "adapter",
        ["adapter_config.json", "adapter_model.safetensors"],
    )
    card = (tmp_path / "hf" / "README.md").read_text()
    assert (
        "The LoRA adapter `adapter` (rank 4, 21 linear layers) was merged into the weights, as PEFT does: its file "
        "`adapter_model.safetensors` has the checksum\n"
        f"`{checksums['adapter_model.safetensors']}` (xxh3_128). No other value was changed."
    ) in card
    convert_checkpoint(base, tmp_path / "plain")
    plain = read_manifest(tmp_path / "plain")
    assert plain is not None
    assert plain.adapter is None
    assert "LoRA" not in (tmp_path / "plain" / "README.md").read_text()


def test_verify_says_which_adapter_is_missing_or_another(base: Path, adapter: Path, tmp_path: Path) -> None:
    save_peft_adapter(base, tmp_path / "other")
    convert_checkpoint(base, tmp_path / "hf", adapter=adapter)
    convert_checkpoint(base, tmp_path / "plain")

    def tensors_of(folder: str, adapter: Path | None) -> tuple[bool | None, str]:
        checks = verify_checkpoint(tmp_path / folder, base, adapter=adapter)
        return next(
            (check.is_ok, check.detail.partition("; ")[2] or check.detail)
            for check in checks
            if check.name == "tensors"
        )

    assert tensors_of("hf", adapter) == (True, "all 30 have the source's bits with the adapter merged")
    assert tensors_of("hf", None) == (
        False,
        "the adapter 'adapter' was merged into this folder; give it with --adapter",
    )
    assert tensors_of("hf", tmp_path / "other") == (
        False,
        "another adapter was merged into this folder, 'adapter'; give that one with --adapter",
    )
    assert tensors_of("plain", adapter) == (False, "no adapter was merged into this folder; leave --adapter out")
    with raises_exactly(
        SettingError,
        f"adapter '{adapter}': has no effect without the source it was merged into; give it",
    ):
        verify_checkpoint(tmp_path / "hf", adapter=adapter)


def test_a_finished_folder_is_of_its_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert_checkpoint(base, tmp_path / "hf", adapter=adapter)
    before = contents(tmp_path / "hf")
    convert_checkpoint(base, tmp_path / "hf", adapter=adapter)
    save_peft_adapter(base, tmp_path / "again" / "adapter")
    for other in (None, tmp_path / "again" / "adapter"):
        with raises_exactly(
            DestinationError,
            f"{tmp_path}/hf: holds another finished conversion: its README.md is another; choose a new or empty folder",
        ):
            convert_checkpoint(base, tmp_path / "hf", adapter=other)
    assert contents(tmp_path / "hf") == before


class Stopped(BaseException):
    """Stands for the end of the process."""


def stop_halfway(written: int) -> None:
    stop_halfway.bytes += written  # type: ignore[attr-defined]  # counts on itself
    if stop_halfway.bytes > 400_000:  # type: ignore[attr-defined]  # counts on itself
        raise Stopped


def test_an_interrupted_merge_goes_on_with_the_same_adapter_only(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same weights, name, size and time: only a number of the settings differs.
    edit(shutil.copytree(adapter, tmp_path / "again" / "adapter"), lora_alpha=7)
    edit(adapter, lora_alpha=6)
    status = (adapter / "adapter_model.safetensors").stat()
    convert_checkpoint(base, tmp_path / "expected", adapter=adapter)
    convert_checkpoint(base, tmp_path / "other", adapter=tmp_path / "again" / "adapter")
    for name, chosen in (("expected", adapter), ("other", tmp_path / "again" / "adapter")):
        stop_halfway.bytes = 0  # type: ignore[attr-defined]  # counts on itself
        with pytest.raises(Stopped):
            convert_checkpoint(base, tmp_path / name[:1], adapter=adapter, jobs=1, progress=stop_halfway)
        journal = (tmp_path / name[:1] / UNFINISHED_NAME).read_text()
        assert "self_attn" in journal
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            os.utime(chosen / file, ns=(status.st_atime_ns, status.st_mtime_ns))
        moved: list[int] = []
        kept = 0
        copy = stream_module.OutputFile._is_there

        def counting(self: Any, output: Any, copy: Any = copy) -> bool:
            nonlocal kept
            found: bool = copy(self, output)
            kept += found
            return found

        with monkeypatch.context() as patch:
            patch.setattr(stream_module.OutputFile, "_is_there", counting)
            convert_checkpoint(base, tmp_path / name[:1], adapter=chosen, progress=moved.append)
        assert (kept > 0) == (chosen == adapter)
        assert contents(tmp_path / name[:1]) == contents(tmp_path / name)


def test_killed_a_rerun_ends_byte_identical(base: Path, adapter: Path, tmp_path: Path, warm_python: WarmPython) -> None:
    convert_checkpoint(base, tmp_path / "expected", adapter=adapter)
    code = f"""
import os, signal
from mistral_large_conversion import convert_checkpoint, hf_files
hf_files.tokenizer_files = lambda *_, **__: {{"tokenizer.model.v3": b"", "tokenizer_config.json": b"{{}}"}}
written = 0
def kill(count):
    global written
    written += count
    if written > 300_000:
        os.kill(os.getpid(), signal.SIGKILL)
convert_checkpoint({str(base)!r}, {str(tmp_path / "hf")!r}, adapter={str(adapter)!r}, progress=kill, jobs=1)
"""
    done = subprocess.run(
        [warm_python.python, "-c", code], env=warm_python.environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "hf" / UNFINISHED_NAME).exists()
    convert_checkpoint(base, tmp_path / "hf", adapter=adapter)
    assert contents(tmp_path / "hf") == contents(tmp_path / "expected")


def test_an_adapter_next_to_the_checkpoint_is_merged_or_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert_checkpoint(base, tmp_path / "expected", adapter=adapter)
    both = shutil.copytree(base, tmp_path / "both")
    for path in adapter.iterdir():
        shutil.copy(path, both)
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(both, tmp_path / "hf")
    assert str(error.value) == (
        f"{both}: holds an adapter next to the checkpoint, which would be left out; merge it with --adapter {both}, or "
        "move adapter_config.json elsewhere"
    )
    with raises_exactly(
        CheckpointError,
        f"{both}: holds an adapter of its own next to the checkpoint, and {adapter} is another: one is merged; give "
        "one of the two with --adapter, and move adapter_config.json elsewhere if it is the other one",
    ):
        convert_checkpoint(both, tmp_path / "hf", adapter=adapter)
    convert_checkpoint(both, tmp_path / "hf", adapter=both)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("hf", "expected")))


def test_the_vendors_file_next_to_the_checkpoint_is_refused(
    base: Path, tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    write_vendors_adapter(tmp_path / "lora", tiny_config)
    shutil.copy(tmp_path / "lora" / "lora.safetensors", base)
    with raises_exactly(
        CheckpointError,
        f"{base}: holds an adapter next to the checkpoint, which would be left out; merge it with --adapter {base}, "
        "or move lora.safetensors elsewhere",
    ):
        convert_checkpoint(base, tmp_path / "hf")


def test_both_ways_between_the_formats_every_byte_comes_back(
    base: Path, adapter: Path, tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    written = convert_adapter(adapter, tmp_path / "vendors", to="consolidated")
    assert (written.ranks, written.scalings, len(written.pairs)) == ((4,), (1.5,), 21)
    convert_adapter(tmp_path / "vendors", tmp_path / "back", to="hf", base=base)
    name = "adapter_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (adapter / name).read_bytes()
    settings, expected = (json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path / "back", adapter))
    changed = {"target_modules": sorted(expected["target_modules"]), "init_lora_weights": True}
    assert settings == {key: expected[key] for key in settings} | changed
    assert_same_merge(base, tmp_path, "adapter", "vendors", "back")


def assert_same_merge(base: Path, tmp_path: Path, *adapters: str) -> None:
    for name in adapters:
        convert_checkpoint(base, tmp_path / f"{name}.hf", adapter=tmp_path / name)
    first, *others = (load_file(tmp_path / f"{name}.hf" / "model.safetensors") for name in adapters)
    for other in others:
        assert_same(other, first)


def test_the_vendors_adapter_in_peft_and_back(base: Path, tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    write_vendors_adapter(tmp_path / "vendors", tiny_config, rank=3, scaling=0.1)
    convert_adapter(tmp_path / "vendors", tmp_path / "peft", to="hf", base="owner/name")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert torch.tensor(config["lora_alpha"] / 3) == torch.tensor(0.1)
    expected = merged_by_peft(base, tmp_path / "peft", torch.bfloat16)
    convert_checkpoint(base, tmp_path / "hf", adapter=tmp_path / "vendors")
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), expected)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="consolidated", base=base)
    assert (tmp_path / "back" / "lora.safetensors").read_bytes() == (
        tmp_path / "vendors" / "lora.safetensors"
    ).read_bytes()
    params = json.loads((tmp_path / "vendors" / "params.json").read_text())
    back = json.loads((tmp_path / "back" / "params.json").read_text())
    # No number divided by 3 is 0.1: the nearest is the same in float32.
    assert back["lora"].pop("scaling") == pytest.approx(params["lora"].pop("scaling"), rel=1e-15)
    assert back == {name: params[name] for name in params if name != "moe"} | {"max_position_embeddings": 131072}


def test_layers_without_lora_get_zeros(base: Path, tmp_path: Path) -> None:
    save_peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"], dtype=torch.bfloat16)
    convert_adapter(tmp_path / "adapter", tmp_path / "vendors", to="consolidated")
    found = load_file(tmp_path / "vendors" / "lora.safetensors")
    assert len(found) == 42
    zeros = {name.split(".")[3] for name, tensor in found.items() if not tensor.any()}
    assert zeros == {"wk", "wo", "w1", "w2", "w3"}
    assert_same_merge(base, tmp_path, "adapter", "vendors")


def test_another_dtype_of_the_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    convert_adapter(adapter, tmp_path / "fp32", to="consolidated")
    convert_adapter(adapter, tmp_path / "bf16", to="consolidated", dtype="bf16")
    found, expected = (load_file(tmp_path / name / "lora.safetensors") for name in ("bf16", "fp32"))
    assert_same(found, {name: tensor.bfloat16() for name, tensor in expected.items()})


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"rank_pattern": {"q_proj": 2}},
            "ranks 2, 4: params.json has a place for one\n  scalings 1.5, 3.0: params.json has a place for one",
        ),
        ({"alpha_pattern": {"q_proj": 2}}, "scalings 0.5, 1.5: params.json has a place for one"),
        ({"target_modules": ["lm_head"]}, "LoRA of 'lm_head.weight': the vendor's code has none outside of the layers"),
    ],
)
def test_what_has_no_place_in_the_vendors_format(
    base: Path, tmp_path: Path, settings: dict[str, Any], problem: str
) -> None:
    save_peft_adapter(base, tmp_path / "adapter", **settings)
    tensors(lambda w: [w.pop(name) for name in list(w) if "lora_" not in name])(tmp_path / "adapter")
    with raises_exactly(
        CheckpointError,
        f"{tmp_path / 'adapter'} has no place in the vendor's format; nothing was done, keep the adapter as PEFT has "
        "it, or "
        f"merge it into its base:\n  {problem}",
    ):
        convert_adapter(tmp_path / "adapter", tmp_path / "vendors", to="consolidated")
    assert not (tmp_path / "vendors").exists()


def test_lora_of_the_head_is_merged(base: Path, tmp_path: Path) -> None:
    save_peft_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "o_proj"])
    tensors(lambda w: [w.pop(name) for name in list(w) if "lora_" not in name])(tmp_path / "adapter")
    convert_checkpoint(base, tmp_path / "hf", adapter=tmp_path / "adapter")
    expected = merged_by_peft(base, tmp_path / "adapter", torch.bfloat16)
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), expected)


def test_an_adapter_is_written_whole_or_not_at_all(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/full: holds 'mine.txt', not of an unfinished conversion; choose a new or empty folder",
    ):
        convert_adapter(adapter, tmp_path / "full", to="consolidated")
    with raises_exactly(
        DestinationError,
        f"{adapter}/out: is, holds or is in the source {adapter}; choose a folder elsewhere",
    ):
        convert_adapter(adapter, adapter / "out", to="consolidated")
    with raises_exactly(
        CheckpointError,
        f"{adapter}: an adapter in adapter_model.safetensors already, which is layout hf; use it unchanged, or "
        "convert it to consolidated",
    ):
        convert_adapter(adapter, tmp_path / "out", to="hf")
    edit(adapter, base_model_name_or_path="/no/such/base")
    with raises_exactly(
        CheckpointError,
        "the base of the adapter: /no/such/base: no such folder; give a folder, or a repository on the hub as "
        "owner/name; name it as `base` where it has moved",
    ):
        convert_adapter(adapter, tmp_path / "out", to="consolidated")
    before = {path.name for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mistral_large_conversion.adapter_formats.os.fsync", fail)
        with raises_exactly(
            DestinationError,
            f"{tmp_path}/out: cannot be written: [Errno 28] No space left on device; fix that and run it again",
        ):
            convert_adapter(adapter, tmp_path / "out", to="consolidated", base=base)
    assert {path.name for path in tmp_path.iterdir()} == before
    (tmp_path / "out").mkdir()
    convert_adapter(adapter, tmp_path / "out", to="consolidated", base=base)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["lora.safetensors", "params.json"]


def test_licence_files_go_with_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "LICENSE").write_text("mine")
    convert_adapter(adapter, tmp_path / "out", to="consolidated")
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"


def test_no_adapter_is_one_line(base: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/nothing: no adapter; give a folder with adapter_config.json and adapter_model.safetensors "
        "(PEFT), or with lora.safetensors and params.json (the vendor's)",
    ):
        convert_checkpoint(base, tmp_path / "hf", adapter=tmp_path / "nothing")
    with raises_exactly(
        CheckpointError,
        "/no/such: no such folder; give a folder, or a repository on the hub as owner/name",
    ):
        convert_checkpoint(base, tmp_path / "hf", adapter="/no/such")
    (tmp_path / "nothing" / "adapter_config.json").write_text("{}")
    (tmp_path / "nothing" / "adapter_model.safetensors").write_bytes(b"")
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/nothing: an adapter of PEFT, which does not say the sizes of its base; give the folder of the "
        "base",
    ):
        read_adapter(tmp_path / "nothing")
