"""Weights streamed to a device, against transformers' own reading of the same files.

On the CPU, which is streamed to only here, the buffers are not pinned and nothing has to be waited for; that what a GPU
needs is asked of it, and in which order, is seen with a stream that only writes down what it is asked.
"""

import errno
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, QuantoConfig

from mistral_large_conversion import convert_checkpoint, hf_files
from mistral_large_conversion.checkpoint.safetensors_header import read_header
from mistral_large_conversion.errors import CheckpointError, SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, streamed_weights
from modeling_mistral_large.consolidated_loading import SplitRopePairs
from modeling_mistral_large.streamed_weights import SWITCH, Staging, StreamedTensor, is_streamed
from tests.support.adapters import save_peft_adapter
from tests.support.checkpoints import write_consolidated
from tests.support.errors import raises_exactly
from tests.support.warm_python import WarmPython

# Fewer rows than the tokenizer has pieces, as nothing here is generated of them.
CONFIG = MistralLargeConfig(
    vocab_size=768,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
MODULES = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMS = ["consolidated", "one consolidated file", "hf", "one hf file", "fp8", "int4", "nvfp4"]
# As the weights are stored; and in another dtype.
QUICK = [("consolidated", torch.bfloat16), ("hf", torch.float32), ("int4", torch.bfloat16)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]
# No power of two, and less than a matrix: tensors are cut within rows.
BUFFER_BYTES = 100_008


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, converted_tokenizer: dict[str, bytes]) -> dict[str, Path]:
    """The same weights in all forms, with an adapter."""
    torch.manual_seed(20240724)
    folder = tmp_path_factory.mktemp("folders")
    found = {form: folder / form.replace(" ", "-") for form in [*FORMS, "adapter"]}
    write_consolidated(found["consolidated"], CONFIG, torch.bfloat16)
    found["one consolidated file"].mkdir()
    weights = [load_file(path) for path in found["consolidated"].glob("*.safetensors")]
    save_file({**weights[0], **weights[1]}, found["one consolidated file"] / "consolidated.safetensors")
    for name in ("params.json", "tokenizer.model.v3"):
        shutil.copy(found["consolidated"] / name, found["one consolidated file"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_files, "tokenizer_files", lambda *_, **__: converted_tokenizer)
        convert_checkpoint(found["consolidated"], found["hf"], max_shard_size="2MB")
        assert len([*found["hf"].glob("*.safetensors")]) > 1
        convert_checkpoint(found["one consolidated file"], found["one hf file"])
        for quantization in ("fp8", "int4", "nvfp4"):
            convert_checkpoint(found["hf"], found[quantization], quantize=quantization)
    save_peft_adapter(found["hf"], found["adapter"])
    return found


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """All tensors that are streamed in a test, also those to the CPU."""
    loaded: list[Tensor] = []
    # Held, because one that is collected ends its threads, too.
    stagings: set[Staging] = set()
    load = Staging.load

    def remember(self: Staging, *arguments: Any) -> Tensor:
        stagings.add(self)
        tensor = load(self, *arguments)
        loaded.append(tensor)
        return tensor

    monkeypatch.setattr(Staging, "load", remember)
    monkeypatch.setattr(streamed_weights, "STREAMED_DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(streamed_weights, "BUFFER_BYTES", BUFFER_BYTES)
    yield loaded
    # Nothing is left running.
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def load(folder: Path, **options: Any) -> Any:
    return MistralLargeForCausalLM.from_pretrained(folder, **options)


def load_unstreamed(folder: Path, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(SWITCH, "0")
        return load(folder, **options)


def assert_same_tensors(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    tensors = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    others = {**dict(found.named_parameters()), **dict(found.named_buffers())}
    assert list(others) == list(tensors)
    for name, tensor in others.items():
        assert (tensor.dtype, tensor.device) == (tensors[name].dtype, tensors[name].device), name
        # Bits: of FP8, equality is not implemented everywhere.
        assert torch.equal(*(value.detach().contiguous().view(torch.uint8) for value in (tensor, tensors[name]))), name


# Whole models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        pytest.param(form, dtype, marks=() if (form, dtype) in QUICK else pytest.mark.slow)
        for form, dtype in product(FORMS, DTYPES)
    ],
    ids=str,
)
def test_all_tensors_are_those_that_transformers_reads(
    folders: dict[str, Path], streamed: list[Tensor], form: str, dtype: torch.dtype, device: str
) -> None:
    options = {"dtype": dtype, "device_map": device}
    expected = load_unstreamed(folders[form], **options)
    assert not streamed
    found = load(folders[form], **options)
    assert len(streamed) >= 21
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("form", ["consolidated", pytest.param("hf", marks=pytest.mark.slow)])
def test_some_layers_may_stay_on_the_disk(
    folders: dict[str, Path], streamed: list[Tensor], form: str, tmp_path: Path
) -> None:
    device_map = dict.fromkeys([*MODULES, "model.layers.0"], "cpu") | {"model.layers.1": "disk"}
    folder = folders[form]
    found, expected = (
        loading(folder, device_map=device_map, offload_folder=tmp_path / loading.__name__)
        for loading in (load, load_unstreamed)
    )
    assert streamed
    assert found.model.layers[1].mlp.up_proj.weight.is_meta
    ids = torch.tensor([[1, 3, 631, 287]])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)
    found.save_pretrained(tmp_path / "saved")
    assert_same_tensors(load_unstreamed(tmp_path / "saved"), load_unstreamed(folder))


def test_what_stays_on_the_cpu_is_mapped(
    folders: dict[str, Path], streamed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model over two devices, only what goes to the streamed one is; the other stands for the CPU here."""
    monkeypatch.setattr(streamed_weights, "STREAMED_DEVICES", {"meta"})
    path = next(folders["hf"].glob("*.safetensors"))
    with streamed_weights.streamed_weights([str(path)], {"cpu", "meta"}) as weights:
        assert weights is not None
        name = next(iter(weights))
        assert torch.equal(weights[name][...].to("cpu"), load_file(path)[name])
        assert torch.equal(weights[name][...].to(), load_file(path)[name])
        assert not streamed
        assert weights[name][...].to("meta").is_meta
    assert len(streamed) == 1


def test_a_cpu_is_not_streamed_to(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would copy what is mapped."""
    monkeypatch.setattr(streamed_weights, "Staging", None)
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"} if not torch.cuda.is_available() else {}):
        load(folders["consolidated"], **options)


@pytest.mark.parametrize(
    ("device", "expected"),
    [(device, True) for device in ("cuda", "cuda:1", torch.device("cuda", 1))]
    + [(device, False) for device in ("cpu", "disk", "meta", "mps", "xpu:0", None, torch.device("cpu"))]
    + [(0, torch.cuda.is_available())],
)
def test_gpus_are_streamed_to_however_a_device_map_names_them(device: Any, expected: bool) -> None:
    assert is_streamed(device) is expected


def test_query_and_key_rows_are_regrouped_where_the_model_is(
    folders: dict[str, Path], streamed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The conversion gets what was streamed: on a GPU it runs there."""
    regrouped: list[Tensor] = []
    convert = SplitRopePairs.convert

    def remember(self: Any, input_dict: dict[str, list[Tensor]], *rest: Any, **options: Any) -> Any:
        regrouped.extend(tensor for tensors in input_dict.values() for tensor in tensors)
        return convert(self, input_dict, *rest, **options)

    monkeypatch.setattr(SplitRopePairs, "convert", remember)
    load(folders["consolidated"], device_map="cpu")
    assert len(regrouped) == 4
    assert {id(tensor) for tensor in regrouped} <= {id(tensor) for tensor in streamed}


@pytest.mark.slow
def test_other_ways_in_are_streamed_too(folders: dict[str, Path], streamed: list[Tensor]) -> None:
    """The Auto classes, `load`, and an adapter with its base."""
    import modeling_mistral_large

    expected = load_unstreamed(folders["hf"], dtype="bfloat16")
    for loading in (AutoModelForCausalLM.from_pretrained, lambda *a, **o: modeling_mistral_large.load(*a, **o)[0]):
        assert_same_tensors(loading(folders["consolidated"], dtype="bfloat16", device_map="cpu"), expected)
        assert len(streamed) == 21
        streamed.clear()
    adapted = load(folders["adapter"], dtype="bfloat16", device_map="cpu")
    # And A and B of each linear layer.
    assert len(streamed) == 21 + 2 * 7 * 2
    assert_same_tensors(adapted, load_unstreamed(folders["adapter"], dtype="bfloat16", device_map="cpu"))


@pytest.mark.slow
@pytest.mark.usefixtures("quanto_kernels")
def test_quantizers_that_work_while_loading_get_the_same_weights(
    folders: dict[str, Path], streamed: list[Tensor]
) -> None:
    found, expected = (
        loading(folders["consolidated"], device_map="cpu", quantization_config=QuantoConfig(weights="int8"))
        for loading in (load, load_unstreamed)
    )
    assert streamed
    ids = torch.tensor([[1, 3, 631, 287]])
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="the ranks talk through gloo")
def test_a_rank_reads_its_shards_only(folders: dict[str, Path], tmp_path: Path, warm_python: WarmPython) -> None:
    forms = ["consolidated", "hf", "int4"]
    warm_python.run_two_ranks("tests.support.streamed_ranks", tmp_path / "result", *(folders[form] for form in forms))
    found = torch.load(tmp_path / "result")
    assert len(found) == len(forms)
    for form, ranks in zip(forms, found, strict=True):
        stored_bytes = sum(
            tensor.nbytes for path in folders[form].glob("*.safetensors") for tensor in load_file(path).values()
        )
        assert len(ranks) == 2
        for is_same, streamed_bytes, own_bytes in ranks:
            assert is_same, form
            # Before 5.23, each rank has all embeddings. Kernels may want codes of 4 bits in another layout.
            assert streamed_bytes < 0.8 * stored_bytes, form
            assert form == "int4" or streamed_bytes == own_bytes, form


# Damage


def test_a_damaged_folder_is_the_same_error(folders: dict[str, Path], streamed: list[Tensor], tmp_path: Path) -> None:
    for form in ("consolidated", "hf"):
        folder = shutil.copytree(folders[form], tmp_path / form)
        path = min(folder.glob("*.safetensors"))
        os.truncate(path, path.stat().st_size - 1000)
        with pytest.raises(CheckpointError) as expected:
            load_unstreamed(folder, device_map="cpu")
        with raises_exactly(CheckpointError, str(expected.value)):
            load(folder, device_map="cpu")
    assert not streamed


def test_a_file_that_is_cut_while_it_is_loaded_is_one_error(
    folders: dict[str, Path], streamed: list[Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = shutil.copytree(folders["one hf file"], tmp_path / "folder")
    path = folder / "model.safetensors"
    read = read_header

    def read_and_cut(path: Path) -> Any:
        entries = read(path)
        os.truncate(path, path.stat().st_size - 1000)
        return entries

    monkeypatch.setattr(streamed_weights, "read_header", read_and_cut)
    last = read(path)[0][-1].name
    message = (
        f"{path}: ends within tensor {last!r}, which its header has whole; a file must stay as it is while it is "
        "loaded; load it again when nothing writes to it, or download it again"
    )
    with raises_exactly(CheckpointError, message):
        load(folder, device_map="cpu")


# One tensor


def streamed_tensor(path: Path, tensor: Tensor, staging: Staging) -> StreamedTensor:
    """A tensor in a file of its own, after another one."""
    save_file({"a": torch.zeros(3), "b": tensor}, path)
    (entry,) = (entry for entry in read_header(path)[0] if entry.name == "b")
    return StreamedTensor(entry, safe_open(path, framework="pt").__enter__().get_slice("b"), staging)


@pytest.fixture
def staging() -> Iterator[Staging]:
    staging = Staging(3, 1000)
    yield staging
    staging.close()


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bfloat16, torch.float8_e4m3fn),
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (*DTYPES[1:], torch.int32, torch.int64)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("shape", "index"),
    [
        ((57, 33), ...),
        ((57, 33), (slice(0, 57), slice(0, 33))),
        ((57, 33), (slice(5, 41), slice(0, 33))),
        ((57, 33), (slice(0, 57), slice(7, 19))),
        ((57, 33), (slice(20, 57), slice(7, 33))),
        ((57, 33), (slice(0, 0), slice(0, 0))),
        ((57, 33), (slice(0, 57), slice(33, 33))),
        ((57, 33), (slice(None), slice(None, 16))),
        ((1700,), ...),
        ((1700,), (slice(3, 1699),)),
        ((), ...),
        ((0,), ...),
        ((5, 7, 11), (slice(1, 4), slice(0, 7), slice(0, 11))),
    ],
    ids=str,
)
def test_a_selection_is_the_librarys(
    tmp_path: Path, streamed: list[Tensor], staging: Staging, shape: tuple[int, ...], index: Any, dtype: torch.dtype
) -> None:
    tensor = torch.randn(shape).mul(100).to(dtype)
    found = streamed_tensor(tmp_path / "file.safetensors", tensor, staging)
    assert found.get_shape() == list(shape)
    loaded = found[index].to("cpu")
    assert len(streamed) == 1
    assert (loaded.dtype, loaded.shape) == (dtype, tensor[index].shape)
    assert torch.equal(
        loaded.view(torch.uint8) if shape else loaded, tensor[index].contiguous().view(torch.uint8) if shape else tensor
    )
    if dtype.is_floating_point:
        assert torch.equal(found[index].to("cpu", torch.float32), tensor[index].float())


@pytest.mark.parametrize(
    "index",
    [
        (slice(1, 4), slice(2, 7), slice(0, 11)),
        (slice(0, 5, 2), slice(0, 7), slice(0, 11)),
        (slice(0, 4),),
        (2, slice(0, 7), slice(0, 11)),
    ],
)
def test_any_other_selection_is_left_to_the_library(
    tmp_path: Path, streamed: list[Tensor], staging: Staging, index: Any
) -> None:
    tensor = torch.randn(5, 7, 11)
    found = streamed_tensor(tmp_path / "file.safetensors", tensor, staging)[index].to("cpu")
    assert not streamed
    assert torch.equal(found, tensor[index])


def test_parts_of_interleaved_shards_are_concatenated(tmp_path: Path, streamed: list[Tensor], staging: Staging) -> None:
    """What transformers does with shards of more than one range, as of FSDP over tensor parallelism."""
    tensor = torch.randn(12, 5)
    found = streamed_tensor(tmp_path / "file.safetensors", tensor, staging)
    parts: Any = [found[start : start + 2, 0:5] for start in (0, 6)]
    assert torch.equal(torch.cat(parts, dim=0).to(device="cpu"), torch.cat([tensor[:2], tensor[6:8]]))


def test_a_tensor_of_an_unknown_dtype_is_left_to_the_library(tmp_path: Path, streamed: list[Tensor]) -> None:
    tensors = {"a": torch.tensor([True, False]), "b": torch.arange(7, dtype=torch.int16), "c": torch.ones(3)}
    save_file(tensors, tmp_path / "file.safetensors")
    with streamed_weights.streamed_weights([str(tmp_path / "file.safetensors")], {"cpu"}) as weights:
        assert weights is not None
        assert all(torch.equal(weights[name][...].to("cpu"), tensor) for name, tensor in tensors.items())
    assert len(streamed) == 1


# Memory and order


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory was used at once")
def test_the_host_holds_the_buffers_and_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tensors, 150 MB in all, for a device without memory, through 4 MB."""
    monkeypatch.setattr(streamed_weights, "STREAMED_DEVICES", {"meta"})
    monkeypatch.setattr(streamed_weights, "BUFFER_BYTES", 2**19)
    monkeypatch.setattr(streamed_weights, "READERS", 4)
    path = tmp_path / "file.safetensors"
    save_file({name: torch.zeros(5000, 5000, dtype=torch.bfloat16) for name in "abc"}, path)

    def kilobytes(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(f"{field}:"))

    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
    with streamed_weights.streamed_weights([str(path)], {"meta"}) as weights:
        assert weights is not None
        bound = weights["a"].staging.memory.nbytes
        assert bound == 2 * 4 * 2**19
        for name in "abc":
            assert weights[name][...].to("meta").shape == (5000, 5000)
    # The buffers, which may not be all touched, and the threads.
    assert kilobytes("VmHWM") - before < bound / 1024 + 8 * 1024


class WrittenDown:
    """A stream of a GPU that writes down what it is asked, and the events of it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.events = 0

    def wait_stream(self, other: Any) -> None:
        self.asked.append(("wait for", other))

    def record_event(self) -> Any:
        self.events += 1
        number, stream = self.events, self

        class Event:
            def synchronize(self) -> None:
                stream.asked.append(("event", number))

        self.asked.append(("record", number))
        return Event()

    def synchronize(self) -> None:
        self.asked.append("synchronize")


def test_a_buffer_is_filled_again_after_it_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: list[Tensor]
) -> None:
    stream = WrittenDown()
    monkeypatch.setattr(Staging, "_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "the caller's")
    # One thread, so that there is one order.
    staging = Staging(1, 1000)
    read = StreamedTensor._reader

    def reader(self: StreamedTensor, offset: int) -> Any:
        fill = read(self, offset)

        def written_down(memory: Tensor) -> None:
            place = (memory.data_ptr() - staging.memory.data_ptr()) // 1000
            stream.asked.append(("fill", place))
            fill(memory)

        return written_down

    monkeypatch.setattr(StreamedTensor, "_reader", reader)
    tensor = torch.randn(1000)
    found = streamed_tensor(tmp_path / "file.safetensors", tensor, staging)[...].to("cpu")
    staging.close()
    assert torch.equal(found, tensor)
    assert stream.asked == [
        ("wait for", "the caller's"),
        *[("fill", 0), ("record", 1), ("fill", 1), ("record", 2)],
        *[("event", 1), ("fill", 0), ("record", 3), ("event", 2), ("fill", 1), ("record", 4)],
        "synchronize",
    ]


def test_memory_is_not_given_back_while_it_is_copied_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: list[Tensor], staging: Staging
) -> None:
    """After an error, the other copies are waited for."""
    stream = WrittenDown()
    monkeypatch.setattr(Staging, "_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    read = StreamedTensor._reader

    def reader(self: StreamedTensor, offset: int) -> Any:
        fill = read(self, offset)

        def fail_first(memory: Tensor) -> None:
            if offset == self.file.offset:
                raise OSError(errno.EIO, "Input/output error")
            time.sleep(0.05)
            fill(memory)

        return fail_first

    monkeypatch.setattr(StreamedTensor, "_reader", reader)
    tensor = streamed_tensor(tmp_path / "file.safetensors", torch.randn(1000), staging)
    with pytest.raises(OSError, match="Input/output error"):
        tensor[...].to("cpu")
    assert stream.asked == [("wait for", None), ("record", 1), ("record", 2), ("record", 3), "synchronize"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_what_was_read_while_it_computes(tmp_path: Path) -> None:
    """Much more than the buffers hold, into memory that kernels in flight have just given back."""
    tensor = torch.randn(64, 2**20).bfloat16()
    staging = Staging(8, 2**20)
    assert staging.memory.is_pinned()
    found = streamed_tensor(tmp_path / "file.safetensors", tensor, staging)
    for index in (..., (slice(0, 64), slice(5, 300_000))):
        for dtype in (torch.bfloat16, torch.float32):
            busy = torch.ones(8192, 8192, device="cuda")
            for _ in range(20):
                busy = busy @ busy * 1e-4
            del busy
            assert torch.equal(found[index].to("cuda", dtype).cpu(), tensor[index].to(dtype))
    staging.close()


# The switch


@pytest.mark.slow
def test_it_is_switched_off_by_the_environment(
    folders: dict[str, Path], streamed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "0")
    load(folders["hf"], device_map="cpu")
    assert not streamed
    monkeypatch.setenv(SWITCH, "off")
    message = f"{SWITCH}='off': must be 1, which is the default, or 0 to load as transformers does"
    with raises_exactly(SettingError, message):
        load(folders["hf"], device_map="cpu")


def test_what_must_not_be_mapped_is_left_to_transformers(folders: dict[str, Path], streamed: list[Tensor]) -> None:
    load(folders["hf"], device_map="cpu", disable_mmap=True)
    assert not streamed
