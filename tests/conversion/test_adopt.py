"""Adopting folders of the HF layout: nothing is copied, nothing of the source changes, and it loads as ours."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mistral_large_conversion import adopt, adopt_checkpoint, inspect_checkpoint, retag_checkpoint, verify_checkpoint
from mistral_large_conversion.adopt import Adoption
from mistral_large_conversion.checkpoint.source_files import file_problem
from mistral_large_conversion.errors import CheckpointError, DestinationError, SettingError
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support import folders
from tests.support.checkpoints import everything_in
from tests.support.command import run
from tests.support.errors import raises_exactly

pytestmark = pytest.mark.slow

SOURCES: dict[str, Callable[[Path], Path]] = {
    "hub_cache": folders.hub_cache,
    "ours": folders.ours,
    "vendor_whole": folders.vendor_whole,
    "fine_tune_of_2024": folders.fine_tune_of_2024,
    "fine_tune_with_model_file": folders.fine_tune_with_model_file,
    "added tokens": lambda folder: folders.fine_tune(
        folder, added=folders.CHATML_TOKENS, template=folders.CHATML_TEMPLATE
    ),
    "v7": lambda folder: folders.fine_tune(folder, "v7"),
    "v7 with added tokens": lambda folder: folders.fine_tune(
        folder, "v7", added=folders.CHATML_TOKENS, template=folders.CHATML_TEMPLATE
    ),
}


@dataclass(frozen=True)
class Adopted:
    """A source, what was adopted of it, and everything below the source's folder before that."""

    source: Path
    folder: Path
    adoption: Adoption
    before: dict[str, Any]


@pytest.fixture(scope="module", params=SOURCES)
def adopted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adopted]:
    """Adopted once for all tests that only read it."""
    place = tmp_path_factory.mktemp("adopted")
    source = SOURCES[request.param](place / "source")
    before = names_in(place / "source")
    adoption = adopt_checkpoint(source, place / "adopted")
    written = names_in(place)
    yield Adopted(source, place / "adopted", adoption, before)
    assert names_in(place) == written


@pytest.fixture
def fine_tune(tmp_path: Path) -> Path:
    return folders.fine_tune(tmp_path / "source")


def names_in(folder: Path) -> dict[str, Any]:
    """Everything below a folder but for the number of names that a file has."""
    return {
        name: (entry[:2] if isinstance(entry, tuple) and len(entry) == 3 else entry)
        for name, entry in everything_in(folder).items()
    }


def test_it_loads_as_ours_and_the_source_is_untouched(adopted: Adopted) -> None:
    source, folder = adopted.source, adopted.folder
    assert names_in(folder.parent / "source") == adopted.before
    assert adopted.adoption.destination == folder
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert (type(tokenizer), type(model)) == (MistralLargeTokenizer, MistralLargeForCausalLM)
    tensors = {
        name: tensor for file in source.glob("model*.safetensors") for name, tensor in load_file(file.resolve()).items()
    }
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mistral_large"


def test_the_weights_are_the_sources_files_and_little_is_written(adopted: Adopted) -> None:
    source, links = adopted.source, adopted.adoption.links
    weights = sorted(path.name for path in source.glob("model*.safetensors"))
    assert weights == sorted(path.name for path in adopted.folder.glob("model*.safetensors"))
    (kind,) = links
    assert kind in ("clone", "hard link")
    assert links[kind] == len(weights)
    own = []
    for path in adopted.folder.iterdir():
        names = (path.name, "tokenizer.model", "tokenizer.model.v3")
        if not any((source / name).exists() and path.samefile(source / name) for name in names):
            own.append(path)
    if kind == "hard link":
        assert not {path.name for path in own} & {*weights}
    written = sum(path.stat().st_size for path in own if path.name not in weights)
    assert written <= 2_000_000


@pytest.mark.parametrize("vocabulary", ["v3", "v7"])
def test_prompts_are_the_references(tmp_path: Path, vocabulary: folders.Vocabulary) -> None:
    adopt_checkpoint(folders.fine_tune(tmp_path / "source", vocabulary), tmp_path / "adopted")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "adopted")
    reference = MistralTokenizer.v7() if vocabulary == "v7" else MistralTokenizer.v3()
    text = "a  b [INST] </s> ▁c"
    expected = reference.encode_chat_completion(ChatCompletionRequest(messages=[UserMessage(content=text)])).tokens
    assert tokenizer.prompt_format == vocabulary
    assert tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False) == expected


def test_added_tokens_and_an_own_template_stay(tmp_path: Path) -> None:
    source = folders.fine_tune(tmp_path / "source", added=folders.CHATML_TOKENS, template=folders.CHATML_TEMPLATE)
    adopt_checkpoint(source, tmp_path / "adopted")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "adopted")
    assert tokenizer.convert_tokens_to_ids(list(folders.CHATML_TOKENS)) == [32768, 32769]
    assert tokenizer.chat_template == folders.CHATML_TEMPLATE
    assert tokenizer.prompt_format is None


def test_a_prompt_format_that_is_asked_for(tmp_path: Path, fine_tune: Path) -> None:
    adopt_checkpoint(fine_tune, tmp_path / "adopted", prompt_format="own")
    tokenizer: Any = MistralLargeTokenizer.from_pretrained(tmp_path / "adopted")
    assert tokenizer.chat_template == folders.OLDER_TEMPLATE
    with raises_exactly(
        SettingError,
        "prompt_format 'v7': the v3 vocabulary of the folder has no [SYSTEM_PROMPT]; take 'v3' or 'own'",
    ):
        adopt_checkpoint(fine_tune, tmp_path / "other", prompt_format="v7")
    assert not (tmp_path / "other").exists()


def test_inspect_and_verify_find_nothing_wrong(adopted: Adopted) -> None:
    assert inspect_checkpoint(adopted.folder).problems == ()
    checks = {check.name: check for check in verify_checkpoint(adopted.folder, adopted.source, progress=False)}
    assert [name for name, check in checks.items() if check.is_ok is False] == []
    assert checks["tensors"].is_ok is True


def no_clone(source: Path, destination: Path) -> bool:
    return False


def no_link(*_: object) -> None:
    raise OSError("another file system")


def test_symbolic_links_are_the_last_choice_and_read_as_the_manifest_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folders.fine_tune_with_model_file(tmp_path / "source")
    monkeypatch.setattr(adopt, "_clone", no_clone)
    assert adopt_checkpoint(source, tmp_path / "hard").links == {"hard link": 2}
    monkeypatch.setattr("os.link", no_link)
    adopted = tmp_path / "adopted"
    assert adopt_checkpoint(source, adopted).links == {"symbolic link": 2}
    assert (adopted / "tokenizer.model.v3").is_symlink() is False
    assert all(check.is_ok is not False for check in verify_checkpoint(adopted))
    retag_checkpoint(adopted, "mistral")
    assert all(check.is_ok is not False for check in verify_checkpoint(adopted))
    # Any other link out of the folder stays refused.
    first = sorted(adopted.glob("*.safetensors"))[0]
    first.unlink()
    shutil.copyfile(source / first.name, tmp_path / "other.safetensors")
    first.symlink_to(tmp_path / "other.safetensors")
    other = (tmp_path / "other.safetensors").resolve()
    assert file_problem(adopted, first.name) == f"{first.name} is a link out of the folder, to '{other}'"


def test_a_file_system_that_clones_gives_files_of_their_own(
    fine_tune: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def clone(target: int, _: int, source: int) -> None:
        os.write(target, os.pread(source, 10**8, 0))

    monkeypatch.setattr(fcntl, "ioctl", clone)
    adoption = adopt_checkpoint(fine_tune, tmp_path / "adopted")
    assert adoption.links == {"clone": 2}
    for name in (f"model-0000{number}-of-00002.safetensors" for number in (1, 2)):
        assert not (tmp_path / "adopted" / name).samefile(fine_tune / name)
        assert (tmp_path / "adopted" / name).read_bytes() == (fine_tune / name).read_bytes()


def test_weights_that_would_have_to_change_are_refused(tmp_path: Path) -> None:
    vendor = folders.vendor(tmp_path / "vendor")
    with raises_exactly(
        CheckpointError,
        f"{vendor}: no weights in the HF layout to link; its bytes would have to change, which `mistral-large convert` "
        "does",
    ):
        adopt_checkpoint(vendor, tmp_path / "out")
    wrapped = folders.fine_tune(
        tmp_path / "wrapped",
        weights={f"_orig_mod.{name}": tensor for name, tensor in folders.hf_demo_weights().items()},
        shards=1,
    )
    with raises_exactly(
        CheckpointError,
        f"{wrapped}: tensor '_orig_mod.lm_head.weight' has the name of a wrapper in its name, from torch.compile or a "
        "trainer: its bytes would have to change, which `mistral-large convert` does",
    ):
        adopt_checkpoint(wrapped, tmp_path / "out")
    with_adapter = folders.fine_tune(tmp_path / "with-adapter")
    (with_adapter / "adapter_config.json").write_text("{}")
    with raises_exactly(
        CheckpointError,
        f"{with_adapter}: holds an adapter next to the checkpoint, which would be left out; merge it with "
        "`mistral-large convert --adapter`, or move adapter_config.json elsewhere",
    ):
        adopt_checkpoint(with_adapter, tmp_path / "out")
    (with_adapter / "adapter_config.json").rename(with_adapter / "lora.safetensors")
    with raises_exactly(
        CheckpointError,
        f"{with_adapter}: holds an adapter next to the checkpoint, which would be left out; merge it with "
        "`mistral-large convert --adapter`, or move lora.safetensors elsewhere",
    ):
        adopt_checkpoint(with_adapter, tmp_path / "out")
    mixed = {**folders.hf_demo_weights(), "model.norm.weight": torch.ones(folders.demo_params()["dim"])}
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/mixed is not a complete hf checkpoint; nothing was done, fix or download it again:\n"
        "  tensors of dtypes BF16, F32: a checkpoint has one; ask for a dtype to have them converted\n"
        "  weights are linked, not converted: its bytes would have to change, which `mistral-large convert` does "
        "with --dtype",
    ):
        adopt_checkpoint(folders.fine_tune(tmp_path / "mixed", weights=mixed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_destination_that_is_not_new_is_refused(fine_tune: Path, tmp_path: Path) -> None:
    target = tmp_path / "adopted"
    adopt_checkpoint(fine_tune, target)
    before = names_in(target)
    with raises_exactly(DestinationError, f"{target}: holds another conversion; choose a new or empty folder"):
        adopt_checkpoint(fine_tune, target)
    for inside in (fine_tune, fine_tune / "inside", tmp_path):
        problem = f"is, holds or is in the source {fine_tune}; choose a folder elsewhere"
        with raises_exactly(DestinationError, f"{inside}: {problem}"):
            adopt_checkpoint(fine_tune, inside)
    assert names_in(target) == before


def test_saving_into_the_folder_does_not_write_the_source(fine_tune: Path, tmp_path: Path) -> None:
    before = names_in(fine_tune)
    adopt_checkpoint(fine_tune, tmp_path / "adopted")
    model: Any = MistralLargeForCausalLM.from_pretrained(tmp_path / "adopted", dtype="auto")
    model.lm_head.weight.data.zero_()
    # Under the names of the files that are there.
    model.save_pretrained(tmp_path / "adopted", max_shard_size="5MB")
    assert names_in(fine_tune) == before
    assert not MistralLargeForCausalLM.from_pretrained(tmp_path / "adopted").lm_head.weight.any()


def test_converting_into_the_folder_does_not_write_the_source(fine_tune: Path, tmp_path: Path) -> None:
    from mistral_large_conversion import convert_checkpoint

    before, target = names_in(fine_tune), tmp_path / "out"
    adopt_checkpoint(fine_tune, target)
    # The worst case: as if this conversion had been interrupted in it.
    (target / "conversion.manifest.json").unlink()
    (target / "conversion.unfinished").write_text("This conversion has not finished.")
    convert_checkpoint(folders.vendor(tmp_path / "vendor"), target, progress=False)
    assert names_in(fine_tune) == before


def test_a_run_that_is_killed_leaves_no_half_folder(fine_tune: Path, tmp_path: Path) -> None:
    before, target = names_in(fine_tune), tmp_path / "adopted"
    code = "import sys; from mistral_large_conversion import adopt_checkpoint; adopt_checkpoint(*sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, str(fine_tune), str(target)])
    while process.poll() is None and not list(tmp_path.glob(".adopted.*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not target.exists() or (target / "conversion.manifest.json").exists()
    if not target.exists():
        adopt_checkpoint(fine_tune, target)
    assert names_in(fine_tune) == before
    assert type(MistralLargeTokenizer.from_pretrained(target)) is MistralLargeTokenizer


def test_the_command(fine_tune: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("adopt", fine_tune, tmp_path / "adopted") == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{tmp_path / 'adopted'}: weights 2 × ")
    assert run("adopt", fine_tune, tmp_path / "other", "--prompt-format", "own", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["source"], sum(report["links"].values()), report["prompt_format"]) == (str(fine_tune), 2, None)
    assert run("adopt", tmp_path / "none", tmp_path / "third") == 2
    assert tuple(capsys.readouterr()) == (
        "",
        f"mistral-large: {tmp_path / 'none'}: no such folder; give a folder, or a repository on the hub as "
        "owner/name\n",
    )


def test_a_retagged_folder_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    source = folders.fine_tune(tmp_path / "source", tokenizer="both")
    adopt_checkpoint(source, tmp_path / "adopted")
    before = everything_in(source)
    retag_checkpoint(tmp_path / "adopted", "mistral")
    assert everything_in(source) == before
    assert json.loads((tmp_path / "adopted" / "config.json").read_text())["model_type"] == "mistral"


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folders.fine_tune(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with raises_exactly(
        DestinationError,
        f"{tmp_path}/full: holds 'mine', not of an unfinished conversion; choose a new or empty folder",
    ):
        adopt_checkpoint(source, tmp_path / "full")
    with raises_exactly(
        DestinationError,
        f"{source}/inside: is, holds or is in the source {source}; choose a folder elsewhere",
    ):
        adopt_checkpoint(source, source / "inside")
    before = everything_in(tmp_path)

    def stop(path: Path, content: bytes) -> None:
        if path.name == "conversion.manifest.json":
            raise KeyboardInterrupt
        path.write_bytes(content)

    with monkeypatch.context() as patched:
        patched.setattr(adopt, "write_file", stop)
        with pytest.raises(KeyboardInterrupt):
            adopt_checkpoint(source, tmp_path / "out")
    assert everything_in(tmp_path) == before
    (tmp_path / "out").mkdir()
    adopt_checkpoint(source, tmp_path / "out")
    assert load_file(next((tmp_path / "out").glob("*.safetensors")))
    assert os.stat(tmp_path / "out").st_mode & 0o777 == os.stat(tmp_path / "full").st_mode & 0o777
    with raises_exactly(DestinationError, f"{tmp_path}/out: holds another conversion; choose a new or empty folder"):
        adopt_checkpoint(source, tmp_path / "out")
