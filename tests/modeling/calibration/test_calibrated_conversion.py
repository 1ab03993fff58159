"""Conversions to calibrated int4: the same files as rounding to the nearest, other codes, and nothing lost by kills."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mistral_large_conversion import (
    Conversion,
    convert_checkpoint,
    inspect_checkpoint,
    read_manifest,
    retag_checkpoint,
    verify_checkpoint,
)
from mistral_large_conversion.destination import UNFINISHED_NAME
from mistral_large_conversion.errors import CheckpointError, DestinationError, SampleFileError, SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.calibration import convert_calibrated, prepare_calibrated_conversion
from modeling_mistral_large.calibration import layers as layers_module
from modeling_mistral_large.quantization.gptq import Hessian, quantize_weight
from tests.support.adapters import save_peft_adapter
from tests.support.checkpoints import contents, write_consolidated
from tests.support.errors import raises_exactly
from tests.support.interruptions import is_whole_or_unnamed, kill_at_random_moments

SAMPLES = [
    {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]},
    {"text": "Rounding to the nearest looks at weights alone; calibration looks at what they do."},
    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
]
SHARDS = "200KB"
# A source whose vocabulary is the vendor's file, converted once.
pytestmark = pytest.mark.usefixtures("known_tokenizer")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, SAMPLES)))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in which all rows are groups of 32 and no two sizes are alike."""
    torch.manual_seed(20240724)
    config = MistralLargeConfig(
        vocab_size=32768,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("model") / "source"
    write_consolidated(folder, config, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def prepared(source: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    """Ready to run into any folder, as preparing takes longer than running."""
    return prepare_calibrated_conversion(
        source, tmp_path_factory.mktemp("never"), calibration=data, max_shard_size=SHARDS, device="cpu"
    )


@pytest.fixture(scope="module")
def whole(prepared: Conversion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "int4"
    run(prepared, folder)
    return folder


def run(prepared: Conversion, folder: Path, progress: Callable[[int], object] | bool = False) -> bool:
    return replace(prepared, destination=folder).run(jobs=2, progress=progress)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def test_only_codes_and_scales_differ_from_rounding_to_the_nearest(source: Path, whole: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "nearest", quantize="int4", max_shard_size=SHARDS, progress=False)
    nearest, calibrated = contents(tmp_path / "nearest"), contents(whole)
    assert nearest.keys() == calibrated.keys()
    differing = {name for name in nearest if nearest[name] != calibrated[name] and not name.endswith(".safetensors")}
    assert differing == {"README.md", "conversion.manifest.json"}
    before, after = weights_of(tmp_path / "nearest"), weights_of(whole)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in before.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in after.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith(("_packed", "_scale"))}


def by_hand(source: Path, sequences: list[list[int]], prepared: Conversion) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scales by the whole model: each stage runs it all, with what was quantized before in its place."""
    model = MistralLargeForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found = {}
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for stage in layers_module.STAGES:
                first = block.get_submodule(stage[0])
                hessian = Hessian(first.in_features)

                def add(_: Any, inputs: tuple[Tensor], hessian: Hessian = hessian) -> None:
                    hessian.add(inputs[0])

                hook = first.register_forward_pre_hook(add)
                # The states between layers are BF16 in the file.
                for ids in sequences:
                    states = model.model.embed_tokens(torch.tensor([ids])).bfloat16().float()
                    rotary = model.model.rotary_emb(states, torch.arange(len(ids)).unsqueeze(0))
                    for before in model.model.layers[: layer + 1]:
                        states = before(states, position_embeddings=rotary, attention_mask=None)
                        states = states.bfloat16().float()
                hook.remove()
                factor = hessian.factor()
                for name in stage:
                    linear = block.get_submodule(name)
                    codes, scales = quantize_weight(linear.weight, factor, 32)
                    found[f"model.layers.{layer}.{name}.weight"] = codes, scales
                    groups = (codes.float() - 8).view(len(codes), -1, 32) * scales.float().unsqueeze(-1)
                    linear.weight.copy_(groups.flatten(-2))
    return found


@pytest.mark.slow
def test_codes_are_those_of_the_whole_model(source: Path, whole: Path, prepared: Conversion) -> None:
    calibrator: Any = prepared.calibrator
    weights = weights_of(whole)
    for name, (codes, scales) in by_hand(source, [list(ids) for ids in calibrator.sequences], prepared).items():
        packed = weights[f"{name}_packed"].view(torch.uint8)
        assert torch.equal(torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2), codes), name
        assert torch.equal(weights[f"{name}_scale"], scales), name


def test_manifest_card_and_inspect_state_method_data_and_settings(whole: Path, data: Path) -> None:
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    manifest = read_manifest(whole)
    assert manifest is not None
    assert manifest.calibration is not None
    stated = manifest.calibration.to_json()
    assert len(stated.pop("tokens_sha256")) == 64
    assert stated == {
        "data": "samples.jsonl",
        "data_sha256": sha256,
        "samples": 3,
        "length": 2048,
        "tokens": 43,
        "damping": 0.01,
        "device": "cpu",
        "dtype": "float32",
        "method": "GPTQ",
        "revision": 1,
    }
    card = " ".join((whole / "README.md").read_text().split())
    assert (
        "The weights of the linear layers of the decoder were quantized to 4 bits with one scale for each group of 32 "
        "weights, layer by layer by GPTQ on 3 sequences, 43 tokens: sequences of at most 2,048 tokens of the file "
        f"`samples.jsonl`, whose SHA-256 is `{sha256}`. No other value was changed."
    ) in card
    assert "without any calibration" not in card
    inspection = inspect_checkpoint(whole)
    assert inspection.problems == ()
    assert inspection.calibration == manifest.calibration.to_json()
    description = f"GPTQ on 3 sequences, 43 tokens, of samples.jsonl (sha256 {sha256[:12]}…)"
    assert manifest.calibration.description == description
    assert f"<td>{description}</td>" in inspection._repr_html_()


def test_it_loads_and_stays_packed(whole: Path) -> None:
    model = MistralLargeForCausalLM.from_pretrained(whole)
    assert "Int4Linear" in str(model.model.layers[2].mlp.down_proj)
    logits = model(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()


@pytest.mark.slow
def test_verify_compares_with_the_manifest_and_the_source(source: Path, whole: Path, tmp_path: Path) -> None:
    detail = {check.name: check for check in verify_checkpoint(whole, source, progress=False)}["tensors"]
    assert detail.is_ok
    assert detail.detail == (
        "all 72 have the source's bits; of calibrated ones the manifest's checksums, and values near the source's"
    )
    name = "model.layers.1.mlp.up_proj.weight"
    for part in ("_packed", "_scale"):
        damaged = Path(shutil.copytree(whole, tmp_path / part))
        flip_a_bit(damaged, name + part)
        found = {check.name: check for check in verify_checkpoint(damaged, source, progress=False)}["tensors"]
        assert not found.is_ok
        assert f"1 of 72 differ, first {name}{part}: " in found.detail


@pytest.mark.slow
def test_verify_knows_another_source(source: Path, whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (first,) = other.glob("consolidated-00001*")
    content = bytearray(first.read_bytes())
    name = b'"layers.1.feed_forward.w3.weight"'
    path = first if name in content else next(other.glob("consolidated-00002*"))
    reverse_rows(path, "layers.1.feed_forward.w3.weight")
    found = {check.name: check for check in verify_checkpoint(whole, other, progress=False)}["tensors"]
    assert not found.is_ok
    assert "model.layers.1.mlp.up_proj.weight_packed: its values differ by 1" in found.detail
    assert found.detail.endswith("% from the source's, those of a calibrated weight by less than 50%")


def flip_a_bit(folder: Path, name: str) -> None:
    from safetensors.torch import save_file

    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        if name in weights:
            weights[name].view(torch.uint8).flatten()[5:6].bitwise_xor_(1)
            save_file(weights, path, metadata={"format": "pt"})


def reverse_rows(path: Path, name: str) -> None:
    from safetensors.torch import save_file

    weights = load_file(path)
    weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, path)


@pytest.mark.slow
def test_a_finished_one_is_compared_and_another_refused(
    prepared: Conversion, source: Path, whole: Path, data: Path, tmp_path: Path
) -> None:
    before = contents(whole)
    assert run(prepared, whole) is False
    assert contents(whole) == before
    damaged = Path(shutil.copytree(whole, tmp_path / "damaged"))
    path = next(damaged.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    problem = rf"\A{re.escape(str(path))}: tensor '[\w.]+' has changed; remove the folder and convert again\Z"
    with pytest.raises(DestinationError, match=problem):
        run(prepared, damaged)
    description = f"its weights are calibrated otherwise: {prepared.plan.calibration.description}"  # type: ignore[union-attr]  # it is there
    with raises_exactly(
        DestinationError, f"{whole}: holds another finished conversion: {description}; choose a new or empty folder"
    ):
        convert_checkpoint(source, whole, quantize="int4", max_shard_size=SHARDS, progress=False)
    nearest = tmp_path / "nearest"
    convert_checkpoint(source, nearest, quantize="int4", max_shard_size=SHARDS, progress=False)
    with raises_exactly(
        DestinationError,
        f"{nearest}: holds another finished conversion: its weights are calibrated otherwise: rounded to the nearest; "
        "choose a new or empty folder",
    ):
        run(prepared, nearest)


def test_retagging_keeps_what_it_was_calibrated_with(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "retagged"))
    before = read_manifest(folder)
    retag_checkpoint(folder, "mistral")
    after = read_manifest(folder)
    assert before is not None
    assert after is not None
    assert after.calibration == before.calibration is not None
    assert all(check.is_ok for check in verify_checkpoint(folder, progress=False))


class Stopped(BaseException):
    """Stands for the end of the process in tests that stay in one process."""


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the layers that are read from now on."""
    layers: list[int] = []
    load = layers_module.LayerCalibrator._load

    def noted(self: Any, weights: Any, layer: int) -> Any:
        layers.append(layer)
        return load(self, weights, layer)

    monkeypatch.setattr(layers_module.LayerCalibrator, "_load", noted)
    return layers


@pytest.mark.slow
def test_an_interrupted_run_goes_on_at_its_layer(
    prepared: Conversion, whole: Path, tmp_path: Path, loaded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, folder = contents(whole), tmp_path / "stopped"

    def stop_at(layer: int) -> None:
        quantize_stage = layers_module.LayerCalibrator._quantize_stage

        def stopping(self: Any, weights: Any, decoder: Any, at: int, stage: Any, states: Any) -> None:
            if at == layer and stage == layers_module.STAGES[2]:
                raise Stopped
            quantize_stage(self, weights, decoder, at, stage, states)

        with monkeypatch.context() as patch:
            patch.setattr(layers_module.LayerCalibrator, "_quantize_stage", stopping)
            with pytest.raises(Stopped):
                run(prepared, folder)

    stop_at(1)
    assert loaded == [0, 1]
    assert is_whole_or_unnamed(folder, expected)
    stop_at(2)
    assert loaded == [0, 1, 1, 2]
    # What the run stood at is damaged: it begins again, and ends in the same bytes.
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (states,) = damaged.glob("calibration-*.partial")
    content = bytearray(states.read_bytes())
    content[7] ^= 1
    states.write_bytes(content)
    run(prepared, damaged)
    assert loaded == [0, 1, 1, 2, 0, 1, 2]
    assert contents(damaged) == expected
    run(prepared, folder)
    assert loaded == [0, 1, 1, 2, 0, 1, 2, 2]
    assert contents(folder) == expected


@pytest.mark.slow
def test_another_setting_begins_anew(prepared: Conversion, tmp_path: Path, loaded: list[int]) -> None:
    """Also one that no small file states."""
    calibrator: Any = prepared.calibrator
    calibration = replace(calibrator.calibration, damping=0.05)
    other = replace(
        prepared,
        plan=replace(prepared.plan, calibration=calibration),
        calibrator=replace(calibrator, calibration=calibration),
    )
    folder = tmp_path / "two"
    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if loaded == [0, 1]:
            raise Stopped

    with pytest.raises(Stopped):
        run(prepared, folder, stop)
    loaded.clear()
    run(other, folder)
    assert loaded == [0, 1, 2]
    run(other, tmp_path / "one")
    assert contents(folder) == contents(tmp_path / "one")


@pytest.mark.slow
def test_a_merged_adapter_is_calibrated_as_the_merged_checkpoint(source: Path, data: Path, tmp_path: Path) -> None:
    save_peft_adapter(source, tmp_path / "adapter", dtype=torch.bfloat16)
    convert_checkpoint(source, tmp_path / "merged", adapter=tmp_path / "adapter", progress=False)
    options: dict[str, Any] = {"calibration": data, "device": "cpu", "progress": False}
    convert_calibrated(source, tmp_path / "at once", adapter=tmp_path / "adapter", **options)
    convert_calibrated(tmp_path / "merged", tmp_path / "after", **options)
    at_once, after = weights_of(tmp_path / "at once"), weights_of(tmp_path / "after")
    assert at_once.keys() == after.keys()
    assert all(torch.equal(at_once[name], after[name]) for name in after)
    manifest = read_manifest(tmp_path / "at once")
    assert manifest is not None
    assert manifest.adapter is not None
    assert manifest.calibration is not None


@pytest.mark.slow
def test_killed_at_random_moments_a_rerun_ends_byte_identical(
    prepared: Conversion, whole: Path, tmp_path: Path
) -> None:
    kills = int(os.environ.get("MISTRAL_LARGE_KILLS", "4"))
    expected, folder, moments = contents(whole), tmp_path / "killed", random.Random(0)
    started = time.monotonic()
    run(prepared, tmp_path / "timed")
    duration = time.monotonic() - started

    def start() -> int:
        child = os.fork()
        if child == 0:
            try:
                run(prepared, folder)
            finally:
                os._exit(0)
        return child

    for _ in kill_at_random_moments(start, kills, duration, moments):
        assert is_whole_or_unnamed(folder, expected)
        # Half of the kills hit what another one has left.
        if moments.random() < 0.5:
            run(prepared, folder)
            assert contents(folder) == expected
            shutil.rmtree(folder)
    run(prepared, folder)
    assert contents(folder) == expected


@pytest.mark.slow
def test_killed_at_every_step_on_the_disk(
    prepared: Conversion, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL before each fsync, rename and removal, one after the other, each run going on from the last."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    expected, folder = contents(whole), tmp_path / "killed"
    for moment in range(1, 200):
        child = os.fork()
        if child == 0:
            steps = iter(range(moment))
            for name in ("fsync", "replace", "unlink"):
                setattr(os, name, dying_before(steps, getattr(os, name)))
            try:
                run(prepared, folder)
            finally:
                os._exit(0)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert is_whole_or_unnamed(folder, expected)
        if not was_killed:
            break
    assert moment > 5
    assert contents(folder) == expected


def dying_before(steps: Iterator[int], act: Callable[..., Any]) -> Callable[..., Any]:
    def act_or_die(*args: Any, **kwargs: Any) -> Any:
        if next(steps, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **kwargs)

    return act_or_die


@pytest.mark.slow
def test_weights_and_activations_that_are_not_finite_are_refused(source: Path, data: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name, value, message in (
        (
            "layers.1.feed_forward.w2.weight",
            torch.inf,
            "tensor 'model.layers.1.mlp.down_proj.weight' holds inf: only finite weights can be quantized; download it "
            "again",
        ),
        (
            # Times a normed state of more than 1.13, more than FP32 holds.
            "layers.0.attention_norm.weight",
            3e38,
            "layer 0: the inputs of self_attn.q_proj are not finite on the calibration data; a checkpoint that "
            "computes finite numbers can be calibrated; check it, or leave --calibration out",
        ),
    ):
        folder = Path(shutil.copytree(source, tmp_path / name))
        for path in folder.glob("*.safetensors"):
            weights = load_file(path)
            if name in weights:
                weights[name][:] = value
                save_file(weights, path)
        with raises_exactly(CheckpointError, message):
            convert_calibrated(folder, tmp_path / f"{name}-int4", calibration=data, progress=False, device="cpu")
        assert (tmp_path / f"{name}-int4" / UNFINISHED_NAME).exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, SettingError, "samples 0: must be a whole number, 1 or more"),
        ({"length": 1}, SettingError, "length 1: must be a whole number, 2 or more"),
        ({"samples": True}, SettingError, "samples True: must be a whole number, 1 or more"),
        pytest.param(
            {"samples": 4},
            SampleFileError,
            "{data}: 3 sequences of at most 2048 tokens, 4 asked for; take a longer file, or fewer samples",
            marks=pytest.mark.slow,
        ),
        ({"device": "tpu"}, SettingError, "device 'tpu': must be one of 'cpu', 'cuda'"),
        (
            {"to": "consolidated"},
            CheckpointError,
            "quantizing to int4: only the HF layout has a place for it; leave `to` out",
        ),
        (
            {"dtype": "fp32"},
            CheckpointError,
            "quantizing to int4: what is not quantized is bf16, with dtype fp32 too; leave `dtype` out",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(
    source: Path, data: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with raises_exactly(error, message.format(data=data)):
        prepare_calibrated_conversion(source, tmp_path / "int4", calibration=data, **options)
    assert not (tmp_path / "int4").exists()


def test_a_gpu_that_is_not_there_is_refused(
    source: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises_exactly(
        SettingError, "device 'cuda': torch finds no GPU; calibrating takes the CPU or a CUDA GPU; pass 'cpu'"
    ):
        prepare_calibrated_conversion(source, tmp_path / "int4", calibration=data, device="cuda")


def test_a_quantized_source_is_refused(whole: Path, data: Path, tmp_path: Path) -> None:
    with raises_exactly(
        CheckpointError,
        f"{whole}: its weights are quantized, and nothing brings back what rounding took away; take the checkpoint it "
        "was made of",
    ):
        prepare_calibrated_conversion(whole, tmp_path / "int4", calibration=data)
