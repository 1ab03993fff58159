"""Checkpoints by their repository's id, from a hub on the loopback interface, with the real client."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from io import StringIO
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint.hub import ANSWER_SECONDS, CONSOLIDATED_FILES, HF_FILES, resolve_source
from mistral_large_conversion.errors import CheckpointError, MistralLargeError
from mistral_large_conversion.inspect import inspect_checkpoint
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.adapter_loading import adapter_base
from modeling_mistral_large.errors import TokenizerFileError
from tests.support.checkpoints import contents
from tests.support.command import run
from tests.support.errors import raises_exactly, whole
from tests.support.loopback_hub import COMMIT, REPOSITORY, LoopbackHub, in_place_of_the_hub

STOPPED = "the download stopped: Server error '{} <*>' for url '<*>'; run it again, the files that are whole are kept"
WANTED = {
    "LICENSE",
    "Notice",
    "consolidated-00001-of-00002.safetensors",
    "consolidated-00002-of-00002.safetensors",
    "consolidated.safetensors.index.json",
    "params.json",
    "tokenizer.model.v3",
}
IDS = torch.arange(1027, 1036)[None]
# What the vendor's repository holds besides: a second copy of the weights and what belongs to it.
UNWANTED = (
    "model-00001-of-00051.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "README.md",
    ".gitattributes",
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    folder = assemble_demo_checkpoint(tmp_path / "repository")
    (folder / "Notice").write_text("a notice")
    for name in UNWANTED:
        (folder / name).write_text(f"{name}: must not be downloaded")
    with in_place_of_the_hub(LoopbackHub(folder), tmp_path / "cache") as hub:
        # What is lost of a file when its connection ends.
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
        yield hub


@pytest.mark.slow
def test_only_what_is_needed_of_a_repository_is_downloaded_and_only_once(hub: LoopbackHub) -> None:
    snapshot = resolve_source(REPOSITORY)
    assert hub.downloaded == WANTED
    assert len(hub.downloads) == len(WANTED)
    assert contents(snapshot) == {name: (hub.folder / name).read_bytes() for name in WANTED}
    assert resolve_source(REPOSITORY, revision=COMMIT) == snapshot
    assert len(hub.downloads) == len(WANTED)
    hub.refuse = HTTPStatus.SERVICE_UNAVAILABLE
    assert resolve_source(REPOSITORY, local_files_only=True) == snapshot


@pytest.mark.slow
def test_other_patterns_take_other_files(hub: LoopbackHub) -> None:
    resolve_source(REPOSITORY, patterns=HF_FILES)
    wanted = set(UNWANTED) - {".gitattributes"}
    assert hub.downloaded == wanted | {"LICENSE", "Notice", "tokenizer.model.v3"}


@pytest.mark.slow
def test_a_connection_that_is_cut_goes_on_where_it_was(hub: LoopbackHub) -> None:
    name = "consolidated-00001-of-00002.safetensors"
    hub.cut_after[name] = 1_000_000
    snapshot = resolve_source(REPOSITORY)
    assert contents(snapshot) == {name: (hub.folder / name).read_bytes() for name in WANTED}
    # The client writes whole chunks of 2**16 bytes.
    assert [range_ for entry, range_ in hub.downloads if entry == name] == [None, f"bytes={15 * 2**16}-"]


@pytest.mark.slow
def test_a_download_that_stopped_goes_on_with_the_files_it_has_not(hub: LoopbackHub) -> None:
    name = "consolidated-00001-of-00002.safetensors"
    hub.broken.add(name)
    # What stopped it is in huggingface_hub's words.
    with pytest.raises(CheckpointError, match=whole(f"{REPOSITORY}: {STOPPED.format(503)}")) as error:
        resolve_source(REPOSITORY)
    assert "\n" not in str(error.value)
    # What no thread had begun by then is not begun any more: on a busy machine, that may be some.
    kept = hub.downloaded - {name}
    assert kept < hub.downloaded <= WANTED
    assert kept
    hub.broken.clear()
    hub.downloads.clear()
    snapshot = resolve_source(REPOSITORY)
    assert contents(snapshot) == {name: (hub.folder / name).read_bytes() for name in WANTED}
    assert sorted(hub.downloads) == [(name, None) for name in sorted(WANTED - kept)]


@pytest.mark.slow
@pytest.mark.parametrize("status", [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN])
def test_a_gated_repository_is_one_line_that_says_where_to_accept_the_terms(
    hub: LoopbackHub, status: HTTPStatus
) -> None:
    hub.gated = status
    with pytest.raises(CheckpointError) as error:
        resolve_source(REPOSITORY)
    assert str(error.value) == (
        f"{REPOSITORY}: gated: accept its terms at {hub.url}/{REPOSITORY}, then log in with `hf auth login` or set "
        "HF_TOKEN"
    )


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (
            HTTPStatus.UNAUTHORIZED,
            "no folder of this name here, and on the hub no repository open to you at http://<*>/owner/name; check "
            "the name, or log in with `hf auth login` or set HF_TOKEN if it is private",
        ),
        (
            HTTPStatus.FORBIDDEN,
            "gated: accept its terms at http://<*>/owner/name, then log in with `hf auth login` or set HF_TOKEN",
        ),
        (HTTPStatus.INTERNAL_SERVER_ERROR, STOPPED.format(500)),
    ],
)
def test_a_hub_that_refuses_is_one_line(hub: LoopbackHub, status: HTTPStatus, problem: str) -> None:
    hub.refuse = status
    with pytest.raises(CheckpointError, match=whole(f"{REPOSITORY}: {problem}")) as error:
        resolve_source(REPOSITORY)
    assert "\n" not in str(error.value)
    assert hub.downloads == []


def test_a_repository_or_a_revision_that_is_not_there_is_one_line(hub: LoopbackHub) -> None:
    with raises_exactly(
        CheckpointError,
        "owner/other: no folder of this name here, and on the hub no repository open to you at "
        f"{hub.url}/owner/other; check the name, or log in with `hf auth login` or set HF_TOKEN if it is private",
    ):
        resolve_source("owner/other")
    with raises_exactly(
        CheckpointError,
        f"owner/name: the repository has no such revision; {hub.url}/owner/name/commits/main lists them",
    ):
        resolve_source(REPOSITORY, revision="v9")


def test_without_a_network_there_is_what_the_cache_has(hub: LoopbackHub) -> None:
    with raises_exactly(
        CheckpointError,
        "owner/name: no folder of this name here, the hub cannot be reached or is not to be asked, and the cache "
        f"has not all that is needed of {hub.url}/owner/name; connect, without HF_HUB_OFFLINE and local_files_only",
    ):
        resolve_source(REPOSITORY, local_files_only=True)
    assert hub.downloads == []


def test_a_folder_is_never_looked_for_on_the_hub(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(REPOSITORY).mkdir(parents=True)
    assert resolve_source(REPOSITORY) == Path(REPOSITORY)
    assert resolve_source(tmp_path) == tmp_path
    Path("owner", "file").write_text("")
    for source, problem in {
        "owner/file": "is a file",
        "nowhere": "no such folder",
        "./owner/other": "no such folder",
        "a/b/c": "no such folder",
        "nobody/": "no such folder",
        str(tmp_path / "nowhere"): "no such folder",
        "../name": "no such folder",
        "owner/na\nme": "no such folder",
    }.items():
        with raises_exactly(
            CheckpointError, f"{source}: {problem}; give a folder, or a repository on the hub as owner/name"
        ):
            resolve_source(source)
    assert hub.downloads == []


def load_all(source: str | Path) -> dict[str, Any]:
    """What every way to read a checkpoint finds in it."""
    model: Any = MistralLargeForCausalLM.from_pretrained(source)
    return {
        "config": MistralLargeConfig.from_pretrained(source).to_diff_dict(),
        "ids": MistralLargeTokenizer.from_pretrained(source).encode("Hello"),
        "logits": model(torch.tensor([[1, 23325]])).logits.tolist(),
        "generation config": model.generation_config.to_dict(),
        "problems": inspect_checkpoint(source).problems,
    }


@pytest.fixture
def closed_port() -> str:
    """The address of a hub that nobody serves."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def silent_port() -> Iterator[str]:
    """The address of a hub that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


UNREACHABLE = ["closed_port", "silent_port", "offline"]


@pytest.fixture(params=UNREACHABLE)
def unreachable(request: pytest.FixtureRequest, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    if request.param == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", request.getfixturevalue(request.param))
    return hub


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toyy", "owner/other"])
@pytest.mark.parametrize(
    "read",
    [
        resolve_source,
        inspect_checkpoint,
        MistralLargeConfig.from_pretrained,
        MistralLargeTokenizer.from_pretrained,
        MistralLargeForCausalLM.from_pretrained,
    ],
)
def test_out_of_reach_what_is_not_here_is_one_line_at_once(
    unreachable: LoopbackHub, read: Callable[[str], Any], name: str
) -> None:
    started = time.monotonic()
    with pytest.raises(MistralLargeError) as error:
        read(name)
    # Nothing but the wait for an answer takes time; machines in use may add to it.
    assert time.monotonic() - started < ANSWER_SECONDS + 2
    # Both what transformers raises and what our own callers catch.
    assert isinstance(error.value, OSError) == (read not in (resolve_source, inspect_checkpoint))
    problem = "no such folder; give a folder, or a repository on the hub as owner/name"
    if "/" in name:
        problem = (
            "no folder of this name here, the hub cannot be reached or is not to be asked, and the cache has not all "
            f"that is needed of {huggingface_hub.constants.ENDPOINT}/{name}; connect, without HF_HUB_OFFLINE and "
            "local_files_only"
        )
    elif isinstance(error.value, TokenizerFileError):
        problem = (
            "no such file or folder; this package reads the v3 and v7 SentencePiece models of "
            "Mistral-Large-Instruct-2407 and 2411; pass a folder with tokenizer.model.v3 or .v7, or with the files "
            "that save_pretrained wrote"
        )
    assert str(error.value) == f"{name}: {problem}"
    assert unreachable.asked == []


@pytest.mark.slow
def test_out_of_reach_a_repository_is_read_from_the_cache(
    hub: LoopbackHub, closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_all(REPOSITORY)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_port)
    assert load_all(REPOSITORY) == expected
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert load_all(REPOSITORY) == expected
    assert hub.asked == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["consolidated", "hf"])
def test_nothing_of_a_local_folder_is_asked_of_the_hub(
    hub: LoopbackHub, layout: str, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A name without a slash, and a file in it, could be those of repositories.
    monkeypatch.chdir(tmp_path)
    Path("toy").symlink_to(hub.folder if layout == "consolidated" else demo_folder)
    if layout == "consolidated":
        for name in UNWANTED:
            (hub.folder / name).unlink()
    load_all("toy")
    for name in ("toy", "toy/tokenizer.model.v3"):
        assert MistralLargeTokenizer.from_pretrained(name).encode("Hello") == [1, 23325]
    AutoConfig.from_pretrained("toy")
    AutoTokenizer.from_pretrained("toy")
    model: Any = AutoModelForCausalLM.from_pretrained("toy")
    chat = pipeline("text-generation", "toy", assistant_model="toy")
    chat("Hello", max_new_tokens=2, do_sample=False)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).save_pretrained("adapter")
    hub.asked.clear()
    MistralLargeForCausalLM.from_pretrained("adapter")
    AutoModelForCausalLM.from_pretrained("adapter")
    AutoPeftModelForCausalLM.from_pretrained("adapter")
    assert run("inspect", "toy") == 0
    assert run("verify", "toy", "toy") == 0
    assert run("plan", "toy", "--gpus", "8x80GB") == 0
    monkeypatch.setattr(sys, "stdin", StringIO("Hello\n"))
    assert run("chat", "toy", "--max-new-tokens", "2") == 0
    # PEFT asks by itself whether an adapter without a tokenizer has one there.
    assert {*hub.asked} <= {"HEAD /adapter/resolve/main/tokenizer_config.json"}


def test_a_server_is_not_started_for_what_is_not_here(
    hub: LoopbackHub, closed_port: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", closed_port)
    for name in ("toyy", "owner/other"):
        assert run("serve", name) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"mistral-large: {name}: no ")


@pytest.mark.slow
def test_the_tokenizer_of_a_repository_is_read_without_the_weights(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = resolve_source(REPOSITORY, patterns=["tokenizer.model.v3"])
    assert hub.downloaded == {"tokenizer.model.v3"}
    assert MistralLargeTokenizer.from_pretrained(folder).encode("Hello") == [1, 23325]


@pytest.mark.slow
def test_a_gated_repository_is_one_line_of_the_command(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.gated = HTTPStatus.FORBIDDEN
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mistral_large_cli", "convert", REPOSITORY, str(tmp_path / "hf")],
        env={**{name: value for name, value in os.environ.items() if not name.startswith("HF_")}, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"mistral-large: {REPOSITORY}: gated: accept its terms at {hub.url}/{REPOSITORY}, then log in with "
        "`hf auth login` or set HF_TOKEN"
    ]
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_the_commands_take_a_repository(hub: LoopbackHub, tmp_path: Path, demo_folder: Path) -> None:
    (hub.folder / "Notice").unlink()
    assert run("convert", REPOSITORY, tmp_path / "hf") == 0
    assert hub.downloaded == WANTED - {"Notice"}
    assert contents(tmp_path / "hf") == contents(demo_folder)
    assert run("verify", tmp_path / "hf", REPOSITORY) == 0
    assert hub.downloaded == WANTED - {"Notice"}


@pytest.mark.slow
def test_a_repository_is_inspected_without_its_weights(hub: LoopbackHub) -> None:
    for name in UNWANTED:
        (hub.folder / name).unlink()
    name = "consolidated-00001-of-00002.safetensors"
    # A header that does not come with the first bytes.
    length = int.from_bytes((hub.folder / name).read_bytes()[:8], "little")
    padded = (hub.folder / name).read_bytes()[8 : 8 + length] + b" " * 200_000
    data = (hub.folder / name).read_bytes()[8 + length :]
    (hub.folder / name).write_bytes(len(padded).to_bytes(8, "little") + padded + data)
    inspection, of_folder = inspect_checkpoint(REPOSITORY), inspect_checkpoint(hub.folder)
    for field in ("kind", "geometry", "dtypes", "tensors", "parameters", "file_bytes", "licence", "problems"):
        assert getattr(inspection, field) == getattr(of_folder, field), field
    assert inspection.problems == ()
    assert inspection.parameters == 4_440_512
    assert f'.from_pretrained("{REPOSITORY}")' in inspection.loads_with[0]
    ranges = sorted(range_ or "all" for file, range_ in hub.downloads if file.endswith(".safetensors"))
    assert ranges == ["bytes=0-99999", "bytes=0-99999", f"bytes=100000-{8 + len(padded) - 1}"]


@pytest.mark.slow
@pytest.mark.parametrize("status", [HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN])
def test_a_gated_repository_is_not_inspected(hub: LoopbackHub, status: HTTPStatus) -> None:
    hub.gated = status
    with raises_exactly(
        CheckpointError,
        f"owner/name: gated: accept its terms at {hub.url}/owner/name, then log in with `hf auth login` or set "
        "HF_TOKEN",
    ):
        inspect_checkpoint(REPOSITORY)


@pytest.mark.slow
def test_a_hub_that_lists_places_outside_of_a_folder_writes_none(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.listed = ["model-/../../escaped.safetensors", "consolidated-/../../escaped.safetensors"]
    inspect_checkpoint(REPOSITORY)
    assert not list(tmp_path.rglob("escaped*"))
    assert not any("escaped" in name for name in hub.downloaded)


def test_the_patterns_name_no_file_of_the_second_copy() -> None:
    assert not any(pattern.startswith(("model", "*")) for pattern in CONSOLIDATED_FILES)


@pytest.fixture
def adapter(hub: LoopbackHub, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """The adapter that the repository holds instead, without a tokenizer: its base and its logits."""
    base = hub.folder
    for name in UNWANTED:
        (base / name).unlink()
    model: Any = MistralLargeForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, init_lora_weights=False)
    adapted: Any = get_peft_model(model, config).eval()
    hub.folder = tmp_path / "adapter"
    adapted.save_pretrained(hub.folder)
    return base, adapted(IDS).logits


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_loaded_on_its_base(
    hub: LoopbackHub,
    adapter: tuple[Path, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, expected = adapter
    for model_class in (MistralLargeForCausalLM, AutoModelForCausalLM):
        model: Any = model_class.from_pretrained(REPOSITORY, dtype=torch.float32)
        assert torch.equal(model.eval()(IDS).logits, expected)
    assert MistralLargeTokenizer.from_pretrained(REPOSITORY).encode("Hello") == [1, 23325]
    monkeypatch.setattr(sys, "stdin", StringIO("Hello\n"))
    assert run("chat", REPOSITORY, "--max-new-tokens", "2") == 0
    assert f"{REPOSITORY}: an adapter, loaded on {base}\n" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_no_checkpoint(
    hub: LoopbackHub,
    adapter: tuple[Path, torch.Tensor],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, _ = adapter
    commands = (
        *(("inspect", REPOSITORY), ("convert", REPOSITORY, "out"), ("verify", str(base), REPOSITORY)),
        ("plan", REPOSITORY, "--gpus", "8x80GB"),
    )
    for command in commands:
        assert run(*command) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith(
            f"mistral-large: {REPOSITORY}: an adapter (PEFT) of the base {str(base)!r}, not a checkpoint; merge it "
            f"with `mistral-large convert BASE DESTINATION --adapter {REPOSITORY}`, "
        )
    # It is served on its base, by an engine that does.
    assert run("serve", REPOSITORY, "--engine", "vllm") == 2
    assert "serve: vLLM is not installed" in capsys.readouterr().err


@pytest.mark.slow
def test_an_adapter_of_the_hub_is_merged(hub: LoopbackHub, adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    base, _ = adapter
    convert_checkpoint(base, tmp_path / "found", adapter=REPOSITORY)
    convert_checkpoint(base, tmp_path / "expected", adapter=hub.folder)
    found, expected = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("found", "expected"))
    assert found == expected
    assert f"The LoRA adapter `{REPOSITORY}` (rank 4" in (tmp_path / "found" / "README.md").read_text()


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_with_an_adapter_next_to_it_is_a_checkpoint(
    hub: LoopbackHub, adapter: tuple[Path, torch.Tensor]
) -> None:
    assert adapter_base(REPOSITORY, {}) == str(adapter[0])
    MistralLargeConfig().save_pretrained(hub.folder)
    assert adapter_base(REPOSITORY, {}) is None


@pytest.mark.slow
@pytest.mark.parametrize("base", ["/no/such/base", "no-such-base"])
def test_an_adapter_of_the_hub_whose_base_is_not_here_is_one_line(
    hub: LoopbackHub, adapter: tuple[Path, torch.Tensor], base: str
) -> None:
    (hub.folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for load in (MistralLargeForCausalLM.from_pretrained, MistralLargeTokenizer.from_pretrained):
        with raises_exactly(
            CheckpointError,
            f"owner/name: an adapter for '{base}', which is no folder here; load the base model from where it is, "
            "then peft.PeftModel.from_pretrained(model, folder)",
        ):
            load(REPOSITORY)
