"""Fixtures that several test files share: the real tokenizer file, the oracles, a tiny geometry, the demo."""

# torch, transformers and mistral-common are imported by the fixtures: the process that hands tests to the workers of
# pytest-xdist reads this file and needs none of them.
import fcntl
import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

    from mistral_large_conversion.checkpoint.geometry import Geometry
    from modeling_mistral_large import MistralLargeConfig, MistralLargeTokenizer
    from tests.support.warm_python import WarmPython

# Tiny models gain nothing from threads, and threads that wait for each other take the cores of the other workers. Read
# when torch is imported, also in the processes that tests start.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# A shell starts what runs in the background with ctrl-C ignored, and so would be what tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Nothing that the imports make is garbage, and there is much of it to go through.
gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage from here on, of what the tests make."""
    gc.freeze()
    gc.enable()


# What the ground floor does without, see the marker `ground_floor`.
UPPER_FLOORS = ("modeling_mistral_large", "transformers")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Hide the upper floors from a test that is marked, and from what prepares it: any import of them is an error."""
    if item.get_closest_marker("ground_floor") is None:
        return (yield)
    with pytest.MonkeyPatch.context() as patch:
        for name in UPPER_FLOORS:
            patch.setitem(sys.modules, name, None)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _merges_made_once() -> Iterator[None]:
    """Remember the merges of a vocabulary, which are most of what it takes to convert one: hundreds of tests do."""
    # The environments of client libraries have no tokenizers.
    if find_spec("tokenizers") is None or find_spec("sentencepiece") is None:
        yield
        return
    from mistral_large_conversion import sentencepiece_bpe

    make = sentencepiece_bpe._text_merges
    made = lru_cache(maxsize=2)(lambda pieces: tuple(make(pieces)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_bpe, "_text_merges", lambda pieces: iter(made(tuple(pieces))))
        yield


@pytest.fixture(scope="session")
def tokenizer_model_file() -> Path:
    from tests.support import checkpoints

    return checkpoints.tokenizer_model_file()


@pytest.fixture(scope="session")
def sentencepiece_processor(tokenizer_model_file: Path) -> "SentencePieceProcessor":
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(tokenizer_model_file))


@pytest.fixture(scope="session")
def reference_tokenizer(tokenizer_model_file: Path) -> Any:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(tokenizer_model_file))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> "MistralLargeTokenizer":
    """Ours, from a folder that holds nothing but tokenizer.model.v3."""
    from tests.support import checkpoints

    return checkpoints.vendor_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def v7_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> "MistralLargeTokenizer":
    """Ours, from a folder that holds nothing but tokenizer.model.v7."""
    from tests.support import checkpoints

    return checkpoints.vendor_tokenizer(tmp_path_factory.mktemp("tokenizer"), "v7")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo checkpoint, converted to the HF layout."""
    from mistral_large_cli.demo import convert_demo_checkpoint

    return convert_demo_checkpoint(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def demo_folder_of_v7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled demo checkpoint of v7, converted to the HF layout."""
    from mistral_large_cli.demo import convert_demo_checkpoint

    return convert_demo_checkpoint(tmp_path_factory.mktemp("demo_of_v7"), "v7")


@pytest.fixture(scope="session")
def warm_python() -> "Iterator[WarmPython]":
    """Commands that start with torch and transformers imported, for programs in processes of their own."""
    from tests.support import warm_python

    with warm_python.start() as commands:
        yield commands


# A geometry in which no two sizes are alike, so that a swap cannot pass.
TINY: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 80,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


@pytest.fixture
def tiny_config() -> "MistralLargeConfig":
    from modeling_mistral_large import MistralLargeConfig

    return MistralLargeConfig(**TINY)


@pytest.fixture(scope="session")
def tiny_geometry() -> "Geometry":
    from mistral_large_conversion.checkpoint.geometry import Geometry

    return Geometry(**TINY, rms_norm_eps=1e-5, rope_theta=1e6)


@pytest.fixture(scope="session")
def converted_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    from mistral_large_conversion.tokenizer import tokenizer_files
    from tests.support import checkpoints

    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model.v3").write_bytes(checkpoints.tokenizer_model_file().read_bytes())
    return tokenizer_files(folder, vocab_size=32768)


@pytest.fixture
def known_tokenizer(converted_tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer is converted once for all tests that are not about it; so weights of any vocabulary do."""
    from mistral_large_conversion import hf_files

    monkeypatch.setattr(hf_files, "tokenizer_files", lambda *_, **__: converted_tokenizer)


@pytest.fixture
def remembered_tokenizer(converted_tokenizer: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's tokenizer is converted once; any other file, or number of rows, is converted each time."""
    from mistral_large_conversion import hf_files
    from mistral_large_conversion.tokenizer import tokenizer_files
    from mistral_large_conversion.vocabulary import find_vocabulary
    from tests.support import checkpoints

    known = checkpoints.tokenizer_model_file().read_bytes()

    def convert_or_remember(source: Path, *, vocab_size: int, **options: Any) -> dict[str, bytes]:
        path = find_vocabulary(source)
        is_known = path is not None and path.is_file() and path.stat().st_size == len(known)
        if path is None or not is_known or vocab_size != 32768 or path.read_bytes() != known:
            return tokenizer_files(source, vocab_size=vocab_size, **options)
        return converted_tokenizer

    monkeypatch.setattr(hf_files, "tokenizer_files", convert_or_remember)


@pytest.fixture
def small_source(tiny_geometry: "Geometry", tmp_path: Path, known_tokenizer: None) -> Path:
    import torch

    from tests.support import checkpoints

    checkpoints.write_consolidated(tmp_path / "source", tiny_geometry, torch.bfloat16)
    return tmp_path / "source"


@pytest.fixture(scope="session")
def quanto_kernels() -> None:
    """quanto's kernels for the CPU, which its first use compiles with the C++ compiler that must be there.

    A process that is killed while it compiles leaves a lock file that every later one waits for without end. Only one
    of ours compiles at a time, by a lock that ends with its process; so a lock file that it finds is such a leftover.
    Every test that uses quanto asks for this fixture.

    The two sources are compiled as one, with fewer headers and without optimization: in a quarter of the time.
    """
    extensions = pytest.importorskip("optimum.quanto.library.extensions", reason="quanto is not installed")
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("quanto compiles its kernels for the CPU, and no C++ compiler (c++ or $CXX) is found")
    kernels = extensions.get_extension("quanto_cpp")
    own = Path(__file__).parent / "support" / "quanto_kernels"
    kernels.extra_cflags = [f"-I{own}", f"-I{Path(kernels.sources[0]).parent}"]
    kernels.sources = [str(own / "kernels.cpp")]
    folder = Path(kernels.build_directory)
    # Not the folder itself, which quanto removes and makes anew.
    descriptor = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        assert kernels.lib
    finally:
        os.close(descriptor)


@pytest.fixture(autouse=True)
def _seed() -> None:
    # The environments of client libraries have no torch.
    if find_spec("torch") is not None:
        import torch

        # As torch.manual_seed does, which takes longer than many a test to look for devices that nobody has.
        torch.default_generator.manual_seed(20240724)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(20240724)
