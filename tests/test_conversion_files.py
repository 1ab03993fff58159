"""Whole conversions: every byte of them, what interrupts them, and the way back."""

import errno
import fcntl
import json
import os
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, MistralForCausalLM

import modeling_mistral_large.conversion.convert as convert_module
import modeling_mistral_large.conversion.stream as stream_module
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.conversion import check_destination, convert_checkpoint, export_checkpoint
from modeling_mistral_large.conversion.destination import OUTPUT_PATTERNS, UNFINISHED_NAME, unfinished
from modeling_mistral_large.conversion.names import TO_HF
from modeling_mistral_large.conversion.tokenizer import tokenizer_files
from modeling_mistral_large.errors import CheckpointError, DestinationError, TokenizerFileError

from .checkpoints import tokenizer_model_file, write_consolidated
from .models import stock_config
from .reference_model import reference_logits
from .test_conversion_tables import split_row_by_row

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def config(tiny_config: MistralLargeConfig) -> MistralLargeConfig:
    """The tiny geometry, with one row for each piece of the real tokenizer."""
    tiny_config.vocab_size = 32768
    return tiny_config


@pytest.fixture
def source(config: MistralLargeConfig, tmp_path: Path) -> Path:
    write_consolidated(tmp_path / "source", config, torch.bfloat16)
    return tmp_path / "source"


@pytest.fixture(scope="module")
def converted_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    return tokenizer_files(folder, vocab_size=32768)


@pytest.fixture
def known_tokenizer(converted_tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is converted once for all tests that are not about it; so weights of any vocabulary do."""
    monkeypatch.setattr(convert_module, "tokenizer_files", lambda *_, **__: converted_tokenizer)


@pytest.fixture
def small_source(tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None) -> Path:
    tiny_config.vocab_size = 768
    write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    return tmp_path / "source"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert name not in weights
            weights[name] = tensor
    return weights


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_logits_of_stock_mistral_from_converted_weights_are_the_references(
    config: MistralLargeConfig, tmp_path: Path
) -> None:
    params, weights = write_consolidated(tmp_path / "source", config)
    convert_checkpoint(tmp_path / "source", tmp_path / "hf", max_shard_size="2MB")
    stock = MistralForCausalLM.from_pretrained(tmp_path / "hf", config=stock_config(config), dtype=torch.float32)
    ids = torch.randint(0, config.vocab_size, (41,))
    with torch.no_grad():
        logits = stock(ids[None]).logits[0]
    expected = reference_logits(weights, params, ids)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_converted_folder_loads_through_the_auto_classes(config: MistralLargeConfig, source: Path) -> None:
    folder = source.parent / "hf"
    convert_checkpoint(source, folder)
    loaded = AutoConfig.from_pretrained(folder)
    assert type(loaded) is MistralLargeConfig
    assert loaded.architectures == ["MistralLargeForCausalLM"]
    assert loaded.dtype == torch.bfloat16
    assert loaded.max_position_embeddings == 131072
    for name in ("hidden_size", "head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps"):
        assert getattr(loaded, name) == getattr(config, name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is MistralLargeTokenizer
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": tokenizer.pad_token_id}
    assert {name: getattr(loaded, name) for name in ids} == ids
    generation_config = GenerationConfig.from_pretrained(folder)
    assert {name: getattr(generation_config, name) for name in ids} == ids
    assert tokenizer.pad_token_id not in (None, 0, 1, 2)
    assert (folder / "chat_template.jinja").is_file()
    assert (folder / "tokenizer.model.v3").read_bytes() == tokenizer_model_file().read_bytes()
    model = MistralLargeForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16


@pytest.mark.usefixtures("known_tokenizer")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("buffer_bytes", [1, 5000, 2**20], ids=["one head", "a few rows", "whole tensors"])
def test_every_bit_arrives_where_it_belongs_and_goes_back(
    tiny_config: MistralLargeConfig,
    tmp_path: Path,
    dtype: torch.dtype,
    buffer_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, weights = write_consolidated(tmp_path / "source", tiny_config, dtype, shards=3)
    # A buffer of one byte would take minutes for the rest; for rotary pairs it means one head at a time.
    monkeypatch.setattr(stream_module, "BUFFER_BYTES", buffer_bytes if buffer_bytes > 1 else 1000)
    convert_checkpoint(tmp_path / "source", tmp_path / "hf", max_shard_size="100KB")
    converted = read_weights(tmp_path / "hf")
    assert len(converted) == len(weights)
    for name, weight in weights.items():
        layer = name.split(".")[1]
        hf_name = TO_HF[name.replace(f"layers.{layer}.", "layers.{layer}.")].format(layer=layer)
        heads = {"wq": 6, "wk": 2}.get(name.split(".")[-2])
        expected = split_row_by_row(weight.view(torch.uint8), heads) if heads else bits(weight)
        assert converted[hf_name].dtype == dtype
        assert torch.equal(bits(converted[hf_name]), expected), name

    export_checkpoint(tmp_path / "hf", tmp_path / "back", max_shard_size="150KB")
    back = read_weights(tmp_path / "back")
    assert back.keys() == weights.keys()
    assert all(torch.equal(bits(back[name]), bits(weights[name])) for name in weights)
    assert json.loads((tmp_path / "back" / "params.json").read_text()) == {**params, "max_position_embeddings": 131072}
    assert (tmp_path / "back" / "tokenizer.model.v3").read_bytes() == tokenizer_model_file().read_bytes()
    convert_checkpoint(tmp_path / "back", tmp_path / "again", max_shard_size="100KB")
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")


def test_a_state_dict_is_exported_like_its_folder(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    model = MistralLargeForCausalLM._from_config(tiny_config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(b"copied as it is")
    # A view that is not contiguous, as a merged adapter may leave it.
    state_dict = {
        name: tensor.mT.clone().mT if tensor.ndim > 1 else tensor for name, tensor in model.state_dict().items()
    }
    export_checkpoint(state_dict, tmp_path / "of_state_dict", config=tiny_config, max_shard_size="90KB")
    export_checkpoint(tmp_path / "hf", tmp_path / "of_folder", max_shard_size="90KB")
    of_state_dict, of_folder = contents(tmp_path / "of_state_dict"), contents(tmp_path / "of_folder")
    assert of_folder.pop("tokenizer.model.v3") == b"copied as it is"
    assert of_folder.pop("LICENSE")
    assert of_folder.pop("Notice")
    assert of_state_dict == of_folder
    assert len(of_state_dict) > 4


def test_stock_mistral_is_exported_too(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock = MistralForCausalLM(stock_config(tiny_config))
    stock.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(b"copied as it is")
    export_checkpoint(tmp_path / "hf", tmp_path / "consolidated")
    ids = torch.randint(0, tiny_config.vocab_size, (17,))
    with torch.no_grad():
        logits = stock(ids[None]).logits[0]
    params = json.loads((tmp_path / "consolidated" / "params.json").read_text())
    assert params["max_position_embeddings"] == 512
    expected = reference_logits(read_weights(tmp_path / "consolidated"), params, ids)
    assert (logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"quantization_config": {}}, "quantization_config is {}"),
        ({"head_dim": 0}, "config.json: head_dim is 0"),
        ({"head_dim": None}, "config.json: head_dim is None"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}}, "rope_type is 'yarn'"),
        (
            {"rope_parameters": None, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear"}},
            "rope_type is 'linear'",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta is 0.0"),
    ],
)
def test_a_config_that_params_cannot_say_is_refused(
    tiny_config: MistralLargeConfig, tmp_path: Path, change: dict[str, Any], finding: str
) -> None:
    MistralLargeForCausalLM(tiny_config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model.v3").write_bytes(b"")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError) as error:
        export_checkpoint(tmp_path / "hf", tmp_path / "consolidated")
    assert finding in str(error.value)
    assert not (tmp_path / "consolidated").exists()


@pytest.mark.parametrize("key", ["head_dim", "rope_parameters", "num_key_value_heads", "rms_norm_eps"])
def test_a_config_without_a_size_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path, key: str) -> None:
    MistralLargeForCausalLM(tiny_config).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != key}))
    with pytest.raises(CheckpointError, match=r"config\.json: .* is missing"):
        export_checkpoint(tmp_path / "hf", tmp_path / "consolidated")


def test_a_state_dict_that_does_not_fit_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    state_dict = MistralLargeForCausalLM(tiny_config).state_dict()
    state_dict["extra"] = state_dict.pop("lm_head.weight")
    state_dict["model.norm.weight"] = torch.zeros(80, dtype=torch.int64)
    with pytest.raises(CheckpointError) as error:
        export_checkpoint(state_dict, tmp_path / "consolidated", config=tiny_config)
    for finding in (
        "tensor 'extra' is extra",
        "tensor 'lm_head.weight' is missing",
        "tensor 'model.norm.weight' has dtype int64",
    ):
        assert finding in str(error.value)
    with pytest.raises(TypeError, match="needs its config"):
        export_checkpoint(state_dict, tmp_path / "consolidated")
    assert not (tmp_path / "consolidated").exists()


def test_files_are_readable_by_the_library_and_say_their_framework(small_source: Path, tmp_path: Path) -> None:
    plan = convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB")
    for file in plan.files:
        path = tmp_path / "hf" / file.name
        assert path.stat().st_size == file.size
        # Data on a multiple of 8 bytes can be mapped into memory as numbers.
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {tensor.name for tensor in file.tensors}
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.tensor_bytes
    assert index["weight_map"] == {tensor.name: file.name for file in plan.files for tensor in file.tensors}


def test_a_single_file_needs_no_index(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors*")) == ["model.safetensors"]


def test_nothing_but_known_files_is_written_and_the_source_stays_as_it_is(small_source: Path, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in small_source.iterdir()}
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in small_source.iterdir()} == before
    for path in (tmp_path / "hf").iterdir():
        assert any(fnmatchcase(path.name, pattern) for pattern in OUTPUT_PATTERNS), path.name
        assert not path.name.endswith(".partial")


def test_the_bytes_are_the_same_on_every_run_and_for_every_way_to_split_the_source(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None
) -> None:
    torch.manual_seed(1)
    write_consolidated(tmp_path / "one", tiny_config, shards=1)
    torch.manual_seed(1)
    write_consolidated(tmp_path / "five", tiny_config, shards=5)
    for source in ("one", "five"):
        convert_checkpoint(tmp_path / source, tmp_path / f"{source}.hf", max_shard_size="200KB")
    assert contents(tmp_path / "one.hf") == contents(tmp_path / "five.hf")


def test_progress_counts_every_byte_of_the_tensors_once(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "BUFFER_BYTES", 10_000)
    counts: list[int] = []
    plan = convert_checkpoint(small_source, tmp_path / "hf", progress=counts.append)
    assert sum(counts) == plan.tensor_bytes
    assert max(counts) <= 10_240


def test_memory_does_not_grow_with_the_tensors(
    tiny_config: MistralLargeConfig, tmp_path: Path, known_tokenizer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_config.num_attention_heads = 200
    tiny_config.num_hidden_layers = 1
    write_consolidated(tmp_path / "source", tiny_config, torch.bfloat16)
    monkeypatch.setattr(stream_module, "BUFFER_BYTES", 2**14)
    tracemalloc.start()
    plan = convert_checkpoint(tmp_path / "source", tmp_path / "hf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest = max(tensor.source.size for file in plan.files for tensor in file.tensors)
    assert largest >= 1_000_000
    assert peak < largest / 2


class Killed(BaseException):
    """Stands for the end of the process in tests that stay in one process."""


def run_and_kill(moment: int, run: Callable[[Callable[[int], None]], Any]) -> bool:
    """Run in a child process that dies by SIGKILL at its `moment`-th step; whether it got that far."""
    child = os.fork()
    if child == 0:
        steps = iter(range(moment))

        def step(*_: Any) -> None:
            if next(steps, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        for name in ("fsync", "replace", "unlink", "mkdir"):
            setattr(os, name, before(step, getattr(os, name)))
        try:
            run(step)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def before(step: Callable[[], None], act: Callable[..., Any]) -> Callable[..., Any]:
    def act_after_step(*args: Any, **kwargs: Any) -> Any:
        step()
        return act(*args, **kwargs)

    return act_after_step


def test_killed_at_any_step_a_rerun_ends_byte_identical(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "BUFFER_BYTES", 100_000)
    # SIGKILL loses nothing that was written, so that waiting for the disk would prove nothing here.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    convert_checkpoint(small_source, tmp_path / "whole", max_shard_size="300KB")
    expected = contents(tmp_path / "whole")
    destination = tmp_path / "killed"
    moments = 0
    while run_and_kill(
        moments, lambda step: convert_checkpoint(small_source, destination, max_shard_size="300KB", progress=step)
    ):
        moments += 1
        found = contents(destination) if destination.exists() else {}
        finished = {name: content for name, content in found.items() if not name.endswith(".partial")}
        finished.pop(UNFINISHED_NAME, None)
        # Whatever has its name is whole, and the index comes when all else is there.
        assert all(expected[name] == content for name, content in finished.items())
        assert "model.safetensors.index.json" not in finished or finished == expected
        # Every third time another run is killed on top of it, the other times it may finish.
        if moments % 3:
            convert_checkpoint(small_source, destination, max_shard_size="300KB")
            assert contents(destination) == expected
            for path in destination.iterdir():
                path.unlink()
    assert moments > 60
    assert contents(destination) == expected


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def recorded_sync(descriptor: int) -> None:
        sync(descriptor)
        events.append(("sync", os.fstat(descriptor).st_ino))

    def recorded_rename(source: Path, target: Path) -> None:
        events.append(("rename", source.stat().st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_sync)
    monkeypatch.setattr(os, "replace", recorded_rename)
    convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="100KB")
    renames = [position for position, (event, _) in enumerate(events) if event == "rename"]
    assert len(renames) == len(list((tmp_path / "hf").iterdir()))
    for position in renames:
        assert events[position - 1] == ("sync", events[position][1])
        assert events[position + 1] == ("sync", (tmp_path / "hf").stat().st_ino)


def test_an_unfinished_conversion_of_another_shape_leaves_nothing(small_source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(small_source, tmp_path / "hf", max_shard_size="50KB", progress=kill_after(600_000))
    assert len(list((tmp_path / "hf").glob("model-*"))) > 5
    convert_checkpoint(small_source, tmp_path / "hf")
    convert_checkpoint(small_source, tmp_path / "whole")
    assert contents(tmp_path / "hf") == contents(tmp_path / "whole")


def kill_after(count: int) -> Callable[[int], None]:
    written = 0

    def progress(advance: int) -> None:
        nonlocal written
        written += advance
        if written > count:
            raise Killed

    return progress


def test_a_full_disk_is_one_error_and_the_rerun_completes(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DestinationError, match=r"not finished: .*No space left on device; .* run it again"):
            convert_checkpoint(small_source, tmp_path / "hf")
    assert not list((tmp_path / "hf").glob("*.safetensors"))
    convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf" / UNFINISHED_NAME).exists()


def test_a_source_that_shrinks_meanwhile_is_one_error(small_source: Path, tmp_path: Path) -> None:
    def shrink(_: int) -> None:
        for path in small_source.glob("consolidated*"):
            os.truncate(path, 2000)

    with pytest.raises(CheckpointError, match="ends early: its file has changed since it was checked"):
        convert_checkpoint(small_source, tmp_path / "hf", progress=shrink)
    assert not (tmp_path / "hf" / "model.safetensors").exists()


def test_two_runs_into_one_folder_refuse_each_other(small_source: Path, tmp_path: Path) -> None:
    with unfinished(tmp_path / "hf"), pytest.raises(DestinationError, match="another conversion writes into it now"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf" / UNFINISHED_NAME).exists()


def test_a_conversion_that_finishes_before_the_lock_is_taken_is_not_replaced(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(small_source, tmp_path / "hf", progress=kill_after(0))

    def finish_and_lock(*_: Any) -> None:
        (tmp_path / "hf" / UNFINISHED_NAME).unlink()

    monkeypatch.setattr(fcntl, "flock", finish_and_lock)
    before = contents(tmp_path / "hf")
    with pytest.raises(DestinationError, match="another conversion has just finished in it"):
        convert_checkpoint(small_source, tmp_path / "hf")
    before.pop(UNFINISHED_NAME)
    assert contents(tmp_path / "hf") == before


def test_a_conversion_that_finished_since_the_check_is_not_replaced(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = check_destination

    def check_and_finish(*arguments: Any) -> None:
        check(*arguments)
        monkeypatch.undo()
        monkeypatch.setattr(convert_module, "tokenizer_files", lambda *_, **__: {})
        convert_checkpoint(small_source, tmp_path / "hf")

    monkeypatch.setattr(convert_module, "check_destination", check_and_finish)
    with pytest.raises(DestinationError, match="not of an unfinished conversion"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert not (tmp_path / "hf" / UNFINISHED_NAME).exists()


def into_source(source: Path) -> Iterator[Path]:
    yield source
    yield source / "hf"
    yield source.parent
    (source.parent / "link").symlink_to(source)
    yield source.parent / "link"
    yield source.parent / "link" / "hf"
    yield source / ".." / source.name


def test_the_source_and_folders_in_and_around_it_are_refused(small_source: Path) -> None:
    before = contents(small_source)
    for destination in into_source(small_source):
        with pytest.raises(DestinationError, match="choose a folder elsewhere"):
            convert_checkpoint(small_source, destination)
    with pytest.raises(DestinationError, match="choose a folder elsewhere"):
        convert_checkpoint(small_source.parent / "link", small_source / "hf")
    assert contents(small_source) == before


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", ".hidden", "config.json"])
def test_a_folder_with_anything_in_it_is_refused(small_source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / name).write_text("mine")
    with pytest.raises(DestinationError, match="choose a new or empty folder"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert contents(tmp_path / "hf") == {name: b"mine"}


def test_a_stranger_in_an_unfinished_conversion_is_not_removed(small_source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(small_source, tmp_path / "hf", progress=kill_after(0))
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    with pytest.raises(DestinationError, match=r"holds 'notes\.txt'"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_a_link_in_place_of_the_marker_is_not_written_through(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / UNFINISHED_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(DestinationError, match="choose a new or empty folder"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_empty_folder_is_taken_and_a_file_is_refused(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    convert_checkpoint(small_source, tmp_path / "hf")
    with pytest.raises(DestinationError, match="is a file"):
        convert_checkpoint(small_source, tmp_path / "hf" / "config.json")
    convert_checkpoint(small_source, tmp_path / "new" / "deep" / "hf")


def test_a_disk_without_room_is_refused_first(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=500_000))
    with pytest.raises(DestinationError, match=r"needs [\d,]+ bytes, the disk has 500,000 free"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_room_that_an_unfinished_conversion_takes_counts_as_free(
    small_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        convert_checkpoint(small_source, tmp_path / "hf", progress=kill_after(0))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    assert sum(path.stat().st_size for path in (tmp_path / "hf").iterdir()) > 4_000_000
    convert_checkpoint(small_source, tmp_path / "hf")


def test_weights_for_another_vocabulary_are_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    write_consolidated(tmp_path / "source", tiny_config)
    with pytest.raises(CheckpointError, match="has 32768 pieces, the weights have 768 rows"):
        convert_checkpoint(tmp_path / "source", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_foreign_tokenizer_file_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.model.v3").write_bytes(b"not SentencePiece")
    with pytest.raises(TokenizerFileError):
        convert_checkpoint(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_tokenizer_that_is_not_exact_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = MistralLargeTokenizer.encode_texts
    monkeypatch.setattr(
        MistralLargeTokenizer,
        "encode_texts",
        lambda self, texts: [
            ids[:-1] if "REFERENCE_DOC" in text else ids for text, ids in zip(texts, exact(self, texts), strict=True)
        ],
    )
    with pytest.raises(CheckpointError, match=r"converted ids of .*REFERENCE_DOC_0.* are not SentencePiece's"):
        convert_checkpoint(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_only_the_tokenizer_model_is_read_of_the_tokenizers_in_the_source(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "expected")
    # Such files are in the vendor's folder too.
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("another template")
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "another template", "pad_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<unk>"}))
    convert_checkpoint(source, tmp_path / "hf")
    assert contents(tmp_path / "hf") == contents(tmp_path / "expected")


def test_weights_without_a_licence_get_the_vendors(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    agreement = (tmp_path / "hf" / "LICENSE").read_text()
    assert agreement.startswith("# Mistral AI Research License\n")
    assert '"You": means the individual or entity entering into this Agreement with\nMistral AI.\n' in agreement
    notice = (tmp_path / "hf" / "Notice").read_text()
    assert notice == "Licensed by Mistral AI under the Mistral AI Research License\n"
    card = (tmp_path / "hf" / "README.md").read_text()
    front_matter = card.split("---\n")[1].splitlines()
    for line in ("license: other", "license_name: mrl", "base_model: mistralai/Mistral-Large-Instruct-2407"):
        assert line in front_matter
    assert "**This checkpoint was modified.**" in card
    assert "import modeling_mistral_large" in card


def test_a_licence_of_the_source_goes_along_and_is_not_called_the_vendors(small_source: Path, tmp_path: Path) -> None:
    (small_source / "LICENSE").write_text("Apache License, Version 2.0")
    convert_checkpoint(small_source, tmp_path / "hf")
    assert (tmp_path / "hf" / "LICENSE").read_text() == "Apache License, Version 2.0"
    assert not (tmp_path / "hf" / "Notice").exists()
    card = (tmp_path / "hf" / "README.md").read_text()
    for claim in ("mrl", "base_model", "Research License", "Instruct-2407"):
        assert claim not in card
    export_checkpoint(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back" / "LICENSE").read_text() == "Apache License, Version 2.0"


def test_the_vendors_licence_stays_the_vendors_on_every_way(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    export_checkpoint(tmp_path / "hf", tmp_path / "back")
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "hf")


def test_a_licence_that_is_a_link_out_is_refused(small_source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("secret")
    (small_source / "LICENSE").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="LICENSE is a link out of the folder"):
        convert_checkpoint(small_source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_no_file_says_where_it_was_made(source: Path, tmp_path: Path) -> None:
    convert_checkpoint(source, tmp_path / "hf")
    for name, content in contents(tmp_path / "hf").items():
        assert str(tmp_path).encode() not in content, name
        assert b"/tmp/" not in content, name
