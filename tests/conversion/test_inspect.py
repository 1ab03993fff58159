"""`mistral-large inspect`: what a folder is, from headers alone; what is wrong is a problem."""

import json
import os
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.inspect import Inspection, inspect_checkpoint
from mistral_large_conversion.retag import retag_checkpoint
from modeling_mistral_large import MistralLargeConfig
from tests.support.checkpoints import tokenizer_model_file, write_headers
from tests.support.command import run
from tests.support.edits import Edit, content, remove, replace, set_json
from tests.support.errors import raises_exactly

NATIVE = "--load-format mistral --config-format mistral --tokenizer-mode mistral"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return assemble_demo_checkpoint(tmp_path / "source")


def test_a_consolidated_folder(source: Path) -> None:
    assert inspect_checkpoint(source) == Inspection(
        name=str(source),
        kind="the vendor's consolidated layout",
        geometry=json.loads((source / "params.json").read_text()),
        bits_per_weight=None,
        dtypes={"BF16": 30},
        tensors=30,
        parameters=sum(tensor.numel() for path in source.glob("*.safetensors") for tensor in load_file(path).values()),
        file_bytes={path.name: path.stat().st_size for path in sorted(source.glob("*.safetensors"))},
        tokenizer=("tokenizer.model.v3",),
        vocabulary="v3",
        prompts="v3; no chat template; the vocabulary is v3's",
        notes=(),
        licence="its own: LICENSE",
        loads_with=(
            "import modeling_mistral_large; "
            f'modeling_mistral_large.MistralLargeForCausalLM.from_pretrained("{source}")',
            f"vllm serve {source} {NATIVE}",
        ),
        problems=(),
    )


@pytest.mark.slow
def test_a_converted_folder_and_what_loads_it(folder: Path, source: Path) -> None:
    inspection, of_source = inspect_checkpoint(folder), inspect_checkpoint(source)
    assert inspection.kind == "HF layout, model type mistral_large"
    for name in ("geometry", "dtypes", "tensors", "parameters", "licence", "problems"):
        assert getattr(inspection, name) == getattr(of_source, name), name
    assert inspection.tokenizer == ("tokenizer.json", "tokenizer_config.json", "tokenizer.model.v3")
    pipeline = f'transformers.pipeline("text-generation", "{folder}", dtype="auto", device_map="auto")'
    assert inspection.loads_with[0] == f"import modeling_mistral_large, transformers; {pipeline}"
    code = inspection.loads_with[0].replace('device_map="auto"', 'device_map="cpu"')
    exec(compile(code, "printed", "exec"), {})
    retag_checkpoint(folder, "mistral")
    inspection = inspect_checkpoint(folder)
    assert inspection.kind == "HF layout, model type mistral"
    assert inspection.problems == ()
    assert inspection.loads_with == (
        f'import modeling_mistral_large; modeling_mistral_large.load("{folder}")',
        f"import transformers; {pipeline}  # stock classes, prompts of the folder's own template",
        f"vllm serve {folder}  # the same",
    )
    exec(compile(inspection.loads_with[0], "printed", "exec"), {})


@pytest.mark.slow
def test_the_123b_is_inspected_from_its_headers(tmp_path: Path) -> None:
    write_headers(tmp_path, MistralLargeConfig(), shards=51)
    (tmp_path / "tokenizer.model.v3").write_bytes(tokenizer_model_file().read_bytes())
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.problems == ()
    assert (inspection.tensors, inspection.parameters) == (795, 122_610_069_504)
    assert len(inspection.file_bytes) == 51
    assert sum(size or 0 for size in inspection.file_bytes.values()) > 245_220_139_008
    assert inspection.licence is None


def both_layouts(folder: Path) -> None:
    assemble_demo_checkpoint(folder)


def quantize(folder: Path) -> None:
    set_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_packed"] = torch.zeros(4, 4, dtype=torch.int32)
    save_file(tensors, folder / "model.safetensors")


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def foreign(folder: Path) -> None:
    empty(folder)
    (folder / "notes.txt").write_text("mine")


HF = "HF layout, model type mistral_large"
CASES: dict[str, tuple[Edit, str, str]] = {
    "both layouts": (both_layouts, "both layouts; the vendor's consolidated layout is the one that is read", ""),
    "unfinished": (content("conversion.unfinished", b""), "an unfinished conversion", "conversion.unfinished: an unf"),
    "quantized": (quantize, f"{HF}, quantized: compressed-tensors", ""),
    "empty": (empty, "something else", "no params.json and no config.json: not a checkpoint"),
    "something else": (
        foreign,
        "something else",
        "not a checkpoint",
    ),
    "only weights": (remove("config.json"), "HF layout, model type None", "config.json is missing"),
    "no weights": (remove("model.safetensors"), HF, "no model.safetensors and no model-00001-of-"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 10**6), HF, "is cut short"),
    "weights empty": (content("model.safetensors", b""), HF, "is not a whole safetensors file"),
    "weights a pipe": (replace("model.safetensors", os.mkfifo), HF, "model.safetensors is not a regular file"),
    "weights a folder": (replace("model.safetensors", Path.mkdir), HF, "model.safetensors is not a regular file"),
    "weights a link out": (
        replace("model.safetensors", lambda path: path.symlink_to("/etc/passwd")),
        HF,
        "model.safetensors is a link out of the folder",
    ),
    "header deep": (
        content("model.safetensors", struct.pack("<Q", 10**5) + b"[" * 10**5),
        HF,
        "model.safetensors has a broken header: JSON nested too deeply",
    ),
    "config not JSON": (content("config.json", b"{"), "HF layout, model type None", "config.json: Expecting"),
    "config a list": (content("config.json", b"[]"), "HF layout, model type None", "must be a JSON object, not list"),
    "config of another model": (
        content("config.json", b'{"model_type": "llama"}'),
        "HF layout, model type llama",
        "model_type is 'llama': only",
    ),
    "config a pipe": (replace("config.json", os.mkfifo), "HF layout, model type None", "config.json is not a regular"),
    "no tokenizer": (remove("tokenizer.json"), HF, "tokenizer.json is missing"),
    "no template": (remove("chat_template.jinja"), HF, "chat_template.jinja is missing"),
    "no licence": (remove("LICENSE"), HF, "no LICENSE: it must go with the weights"),
    "licence a pipe": (replace("LICENSE", os.mkfifo), HF, "LICENSE is not a regular file"),
    "another number": (
        content("generation_config.json", b'{"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 384}'),
        HF,
        "generation_config.json: eos_token_id is 7, config.json has 2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_a_problem_and_not_an_error(folder: Path, case: str) -> None:
    act, kind, problem = CASES[case]
    act(folder)
    before = sorted(folder.iterdir())
    inspection = inspect_checkpoint(folder)
    assert inspection.kind == kind
    assert any(problem in found for found in inspection.problems) or (problem, inspection.problems) == ("", ())
    is_sound = bool(inspection.loads_with)
    assert is_sound == (
        case in ("both layouts", "no tokenizer", "no template", "no licence", "licence a pipe", "another number")
    )
    assert json.dumps(inspection.problems)
    assert sorted(folder.iterdir()) == before


@pytest.mark.slow
def test_a_quantized_checkpoint_is_counted(folder: Path) -> None:
    quantize(folder)
    changed = [f"{name} has changed since the conversion" for name in ("config.json", "model.safetensors")]
    assert inspect_checkpoint(folder).problems == tuple(changed)
    (folder / "conversion.manifest.json").unlink()
    inspection = inspect_checkpoint(folder)
    assert inspection.dtypes == {"BF16": 30, "I32": 1}
    assert inspection.parameters == 4_440_512 + 16
    assert inspection.problems == ()
    assert inspection.loads_with == ()


def test_what_cannot_be_opened_at_all_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/nowhere: no such folder; give a folder, or a repository on the hub as owner/name",
    ):
        inspect_checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/file: is a file; give a folder, or a repository on the hub as owner/name",
    ):
        inspect_checkpoint(tmp_path / "file")

    def fail(self: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", fail)
    monkeypatch.setattr(Path, "glob", lambda *_: fail(tmp_path))
    with raises_exactly(CheckpointError, f"{tmp_path}: cannot be read: [Errno 13] Permission denied"):
        inspect_checkpoint(tmp_path)


@pytest.mark.slow
def test_the_command_prints_lines_that_can_be_copied_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spaced = folder.rename(folder.parent / "the [red] hf")
    assert run("inspect", spaced) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"what        {HF}" in lines
    assert "tensors     30 tensors, 4,440,512 parameters, BF16 × 30" in lines
    assert "files       1 × *.safetensors, 8,884,200 bytes" in lines
    assert "problems    none" in lines
    inspection = inspect_checkpoint(spaced)
    assert f"loads with  {inspection.loads_with[0]}" in lines
    assert f"vllm serve '{spaced}'" in inspection.loads_with[1]
    assert run("inspect", spaced, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(asdict(inspection)))


@pytest.mark.slow
def test_an_adapter_next_to_a_checkpoint_is_said(source: Path, folder: Path) -> None:
    for each in (source, folder):
        (each / "lora.safetensors").write_bytes(b"")
        assert (
            "holds lora.safetensors next to the checkpoint, which would be left out; move it with the params.json of "
            "its training into a folder of its own, and give that as the adapter" in inspect_checkpoint(each).problems
        )
        (each / "lora.safetensors").rename(each / "adapter_config.json")
        assert inspect_checkpoint(each).notes == (
            "an adapter (PEFT) next to the checkpoint: transformers and this package load it as well; `mistral-large "
            "convert` and vLLM need --adapter for it",
        )
