"""A streamed model computes what the whole model computes, whatever the checkpoint."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralForCausalLM

from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint import open_checkpoint
from mistral_large_conversion.errors import CheckpointError, DestinationError, SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from modeling_mistral_large.streamed import Activations, LayerStream, activations, layer_stream, release, tensors
from tests.support import folders
from tests.support.checkpoints import write_consolidated
from tests.support.errors import raises_exactly
from tests.support.models import random_ids, stock_and_ours
from tests.support.peak_memory import PeakMemory

DTYPES = [None, torch.float32, torch.float16]
quick_as_stored = pytest.mark.parametrize(
    "dtype", [None, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[1:])]
)


def streamed_logits(stream: LayerStream, ids: Tensor) -> Tensor:
    hidden = stream.embed(ids)
    for _, layer in stream.layers():
        hidden = stream.run(layer, hidden)
    return stream.logits(stream.norm(hidden))


def load(folder: Path, dtype: torch.dtype | None) -> Any:
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    return MistralLargeForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def whole_logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids).logits
    return found


@quick_as_stored
def test_logits_are_those_of_the_stock_model(
    tiny_config: MistralLargeConfig, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks each, the last of them not full.
    monkeypatch.setattr(layer_stream, "HEAD_ROWS", 100)
    monkeypatch.setattr(tensors, "BYTES_AT_ONCE", 5000)
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path)
    if dtype is not None:
        stock.to(dtype)
    stream = LayerStream(open_checkpoint(tmp_path), dtype=dtype)
    assert stream.dtype == (dtype or torch.float32)
    tolerance = {torch.float16: 0.05}.get(stream.dtype, 1e-4)
    for batch, length in ((1, 1), (2, 40)):
        ids = random_ids(tiny_config, batch, length)
        torch.testing.assert_close(
            streamed_logits(stream, ids), whole_logits(stock, ids), rtol=tolerance, atol=tolerance
        )


@quick_as_stored
def test_a_consolidated_checkpoint_is_read_in_its_order_of_rows(
    tiny_config: MistralLargeConfig, dtype: torch.dtype | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer rows than a head has: they come in whole heads all the same.
    monkeypatch.setattr(tensors, "BYTES_AT_ONCE", 100)
    folder = tmp_path / "consolidated"
    write_consolidated(folder, tiny_config, torch.bfloat16)
    model = load(folder, dtype)
    stream = LayerStream(open_checkpoint(folder), dtype=dtype)
    assert stream.dtype == model.dtype
    ids = random_ids(tiny_config, 1, 30)
    assert torch.equal(streamed_logits(stream, ids), whole_logits(model, ids))


FOLDERS: dict[str, Callable[[Path], Path]] = {
    name: folders.FOLDERS[name] for name in ("vendor", "vendor_whole", "hub_cache", "ours", "fine_tune_of_2024")
}


@pytest.mark.slow
@pytest.mark.usefixtures("remembered_tokenizer")
@pytest.mark.parametrize("kind", [*FOLDERS, "fp8", "int4", "nvfp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_are_bit_for_bit_those_of_the_whole_model(
    kind: str, dtype: torch.dtype | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.getbasetemp() / f"streamed-{kind}"
    folder = root / "folder"
    if not root.exists():
        root.mkdir()
        if kind in FOLDERS:
            found = FOLDERS[kind](folder)
            (root / "path").write_text(str(found))
        else:
            scheme: Any = kind
            convert_checkpoint(folders.vendor(root / "vendor"), folder, quantize=scheme)
            (root / "path").write_text(str(folder))
    folder = Path((root / "path").read_text())
    model = load(folder, dtype)
    stream = LayerStream(open_checkpoint(folder), dtype=dtype)
    assert stream.dtype == model.dtype
    # The kernel for 4 bits takes up to 32 tokens.
    for length in (9, 70):
        ids = random_ids(model.config, 1, length)
        assert torch.equal(streamed_logits(stream, ids), whole_logits(model, ids))


@pytest.mark.slow
def test_one_layer_is_in_memory_at_a_time(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    tiny_config.num_hidden_layers, tiny_config.intermediate_size = 6, 4096
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path)
    of_layer = sum(parameter.nbytes for parameter in stock.model.layers[0].parameters())
    stream = LayerStream(open_checkpoint(tmp_path))
    hidden = stream.embed(torch.tensor([[5, 6]]))
    held = []
    with PeakMemory() as memory:
        for _, layer in stream.layers():
            hidden = stream.run(layer, hidden)
            # Whoever keeps the modules does not keep their weights.
            held.append(layer)
    assert of_layer < memory.peak < 1.5 * of_layer
    assert all(parameter is None for layer in held for parameter in layer.mlp.up_proj._parameters.values())


def test_a_released_layer_has_no_weights(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path)
    layer = LayerStream(open_checkpoint(tmp_path)).load_layer(1)
    wanted = dict(stock.model.layers[1].named_parameters())
    found = dict(layer.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(parameter.requires_grad for parameter in found.values())
    release(layer)
    assert not list(layer.parameters())


def test_only_the_rows_of_the_ids_are_read(
    tiny_config: MistralLargeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path)
    stream = LayerStream(open_checkpoint(tmp_path))
    ids = torch.tensor([[7, 700, 7], [0, 767, 7]])
    read = []
    fill = tensors._fill

    def note(stream: Any, target: Tensor, tensor: Any) -> None:
        read.append(target.shape)
        fill(stream, target, tensor)

    monkeypatch.setattr(tensors, "_fill", note)
    assert torch.equal(stream.embed(ids), stock.model.embed_tokens(ids))
    assert read == [(80,)] * 4


def test_a_dtype_without_products_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    with raises_exactly(
        SettingError,
        f"{tmp_path / 'source'}: computes in float8_e4m3fn, which has no products; "
        "pass dtype: bfloat16, float16 or float32",
    ):
        LayerStream(open_checkpoint(tmp_path / "source"), dtype=torch.float8_e4m3fn)


def test_a_device_that_is_not_there_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    checkpoint = open_checkpoint(tmp_path / "source")
    for device in ("gpu", "cuda:99"):
        with pytest.raises(SettingError, match=rf"^device '{device}': .+; pass auto, cpu, cuda, cuda:1 or mps$"):
            LayerStream(checkpoint, device=device)
    assert LayerStream(checkpoint, device="auto").device.type in ("cpu", "cuda", "mps")


def test_a_file_that_was_cut_meanwhile_is_an_error(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path)
    stream = LayerStream(open_checkpoint(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with raises_exactly(
        CheckpointError,
        f"{path}: 'model.layers.2.self_attn.q_proj.weight' ends before its last byte: the file has changed since it "
        "was opened; a checkpoint stays as it is while it is read; run it again",
    ):
        stream.load_layer(2)


@pytest.mark.parametrize(("name", "content"), [("adapter_config.json", "{}"), ("lora.safetensors", "")])
def test_an_adapter_next_to_the_checkpoint_is_not_left_out(
    name: str, content: str, tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_consolidated(source, tiny_config, torch.bfloat16)
    (source / name).write_text(content)
    with raises_exactly(
        CheckpointError,
        f"{source}: holds an adapter ({name}) next to the checkpoint, which belongs to the model; layers are read of "
        "whole checkpoints; merge it with `mistral-large convert --adapter`, or move it away",
    ):
        open_checkpoint(source)


# Activations


@pytest.mark.parametrize("bytes_in_memory", [0, 10**9])
def test_activations_come_back_from_memory_and_from_disk(
    bytes_in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "BYTES_IN_MEMORY", bytes_in_memory)
    states = [torch.randn(1, length, 16).bfloat16() for length in (3, 1, 7)]
    with Activations([3, 1, 7], 16, torch.bfloat16, folder=tmp_path) as stored:
        assert (stored._file is None) == (bytes_in_memory > 0)
        for index in (2, 0, 1):
            stored[index] = states[index]
        stored[0] = states[0] + 1
        assert torch.equal(stored[0], states[0] + 1)
        assert all(torch.equal(stored[index], states[index]) for index in (1, 2))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_with_the_room_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "BYTES_IN_MEMORY", 0)

    class FullDisk:
        def seek(self, _: int) -> None: ...

        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    stored = Activations([1000], 16, torch.float32, folder=tmp_path)
    monkeypatch.setattr(stored, "_file", FullDisk())
    with raises_exactly(
        DestinationError,
        f"{tmp_path}: no room for 0.0 GB of activations (No space left on device); they go to a temporary file where "
        "they are large; set TMPDIR to a larger disk, or take fewer or shorter samples",
    ):
        stored[0] = torch.zeros(1, 1000, 16)


def test_a_stock_config_with_another_dtype_than_its_weights(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    loaded: Any = MistralForCausalLM.from_pretrained(tmp_path).eval()
    stream = LayerStream(open_checkpoint(tmp_path))
    assert stream.dtype == loaded.dtype == torch.bfloat16
