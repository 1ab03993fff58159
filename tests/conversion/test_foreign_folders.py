"""Folders of others through convert, verify and inspect: every kind works, or is refused with one true reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from mistral_large_conversion import (
    adopt_checkpoint,
    convert_checkpoint,
    inspect_checkpoint,
    prepare_conversion,
    retag_checkpoint,
    verify_checkpoint,
)
from mistral_large_conversion.chat_templates import CHAT_TEMPLATES
from mistral_large_conversion.errors import CheckpointError, SettingError
from tests.support import folders
from tests.support.checkpoints import everything_in, tokenizer_model_file
from tests.support.edits import set_json
from tests.support.errors import raises_exactly
from tests.support.folders import CHATML_TEMPLATE, CHATML_TOKENS


def tensors_of(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob(f"{stem}*.safetensors") for name, tensor in load_file(file).items()}


def chatml(folder: Path) -> Path:
    return folders.fine_tune(folder, "v7", added=CHATML_TOKENS, template=CHATML_TEMPLATE)


HF_FOLDERS: dict[str, Callable[[Path], Path]] = {
    **{name: build for name, build in folders.FOLDERS.items() if not name.startswith("vendor")},
    "chatml": chatml,
    "fine_tune_v7": lambda folder: folders.fine_tune(folder, "v7", tokenizer="both"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HF_FOLDERS)
def test_every_hf_folder_becomes_one_of_ours_bit_for_bit(tmp_path: Path, name: str) -> None:
    source = HF_FOLDERS[name](tmp_path / "source")
    before = everything_in(source)
    conversion = prepare_conversion(source, tmp_path / "hf")
    conversion.run()
    assert everything_in(source) == before
    found, wanted = tensors_of(tmp_path / "hf"), tensors_of(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[tensor], wanted[tensor]) for tensor in wanted)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "mistral_large"
    assert config["vocab_size"] == wanted["lm_head.weight"].shape[0]
    assert {check.name for check in verify_checkpoint(tmp_path / "hf") if not check.is_ok} == set()
    assert {check.name for check in verify_checkpoint(tmp_path / "hf", source) if check.is_ok is False} == set()
    assert inspect_checkpoint(tmp_path / "hf").problems == ()
    # A second run compares, and finds the same.
    assert not prepare_conversion(source, tmp_path / "hf").run()


@pytest.mark.slow
def test_a_fine_tune_keeps_its_tokens_template_and_settings(tmp_path: Path) -> None:
    source = chatml(tmp_path / "source")
    set_json(source / "tokenizer_config.json", eos_token="<|im_end|>")
    conversion = prepare_conversion(source, tmp_path / "hf")
    assert conversion.remarks[0].startswith(
        "prompts: those of its own chat template; the chat template writes turns in"
    )
    conversion.run()
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert (settings["eos_token"], settings["prompt_format"]) == ("<|im_end|>", None)
    assert "response_template" not in settings
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == CHATML_TEMPLATE
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in CHATML_TOKENS] == [32768, 32769]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "# Converted checkpoint" in card
    assert "base_model" not in card
    asked = prepare_conversion(source, tmp_path / "asked", prompt_format="v7")
    assert asked.small_files["chat_template.jinja"].decode() == CHAT_TEMPLATES["v7"]
    assert json.loads(asked.small_files["tokenizer_config.json"])["prompt_format"] == "v7"


@pytest.mark.slow
def test_several_templates_stay_several(tmp_path: Path) -> None:
    source = chatml(tmp_path / "source")
    named = [{"name": "default", "template": CHATML_TEMPLATE}, {"name": "tool_use", "template": "tools"}]
    set_json(source / "tokenizer_config.json", chat_template=named)
    convert_checkpoint(source, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["chat_template"] == named
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert all(check.is_ok for check in verify_checkpoint(tmp_path / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["v3", "v7"])
def test_a_tokenizer_json_alone_goes_to_the_consolidated_layout(tmp_path: Path, vocabulary: Any) -> None:
    source = folders.fine_tune(tmp_path / "source", vocabulary)
    convert_checkpoint(source, tmp_path / "consolidated", to="consolidated")
    found, wanted = tensors_of(tmp_path / "consolidated", "consolidated"), folders.demo_weights()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    made = SentencePieceProcessor(model_file=str(tmp_path / "consolidated" / f"tokenizer.model.{vocabulary}"))
    vendors = SentencePieceProcessor(model_file=str(tokenizer_model_file(vocabulary)))
    assert made.encode(" a  b [INST] 🎉") == vendors.encode(" a  b [INST] 🎉")
    assert all(check.is_ok is not False for check in verify_checkpoint(tmp_path / "consolidated", source))


@pytest.mark.slow
def test_what_the_consolidated_layout_has_no_place_for_is_refused(tmp_path: Path) -> None:
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/added: the weights have 32770 rows, tokenizer.model.v7 has 32768 pieces: 2 were added, "
        "['<|im_start|>', '<|im_end|>'], and the consolidated layout has no place for added tokens; use the HF "
        "layout, or remove them and their rows first",
    ):
        prepare_conversion(chatml(tmp_path / "added"), tmp_path / "out", to="consolidated")
    own = folders.fine_tune(tmp_path / "own", template=CHATML_TEMPLATE)
    with raises_exactly(
        CheckpointError,
        f"{own}: its prompts are those of its own chat template, as the chat template writes turns in another "
        "format than [INST] …[/INST] …</s>, and readers of the consolidated layout take v3 for this vocabulary; "
        "use the HF layout, or pass prompt_format 'v3' if that is right",
    ):
        prepare_conversion(own, tmp_path / "out", to="consolidated")
    prepare_conversion(own, tmp_path / "out", to="consolidated", prompt_format="v3")
    (own / "added_tokens.json").write_text(json.dumps({"<x>": 20}))
    with raises_exactly(
        CheckpointError,
        f"{own}: added_tokens.json: token 20 is '<x>', and '[control_18]' elsewhere; the consolidated layout takes "
        "the v3 and v7 vocabularies only; use the HF layout",
    ):
        prepare_conversion(own, tmp_path / "out", to="consolidated")
    vendor = folders.vendor(tmp_path / "vendor")
    with raises_exactly(
        SettingError,
        "prompt_format 'v3': has no effect on the consolidated layout, whose vocabulary decides; leave it out",
    ):
        prepare_conversion(vendor, tmp_path / "out", prompt_format="v3")


@pytest.mark.slow
def test_another_vocabulary_is_carried_along(tmp_path: Path) -> None:
    source = folders.fine_tune(tmp_path / "source")
    text = (source / "tokenizer.json").read_text().replace('"[control_20]"', '"<|im_start|>"')
    (source / "tokenizer.json").write_text(text)
    (source / "tokenizer.model").write_bytes(tokenizer_model_file().read_bytes())
    (source / "special_tokens_map.json").write_text("{}")
    conversion = prepare_conversion(source, tmp_path / "hf")
    conversion.run()
    assert any("carried along unchanged" in remark for remark in conversion.remarks)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    results = {check.name: check.is_ok for check in verify_checkpoint(tmp_path / "hf")}
    assert (results["tokenizer"], results["tensors"], results["files"]) == (None, True, True)


@pytest.mark.slow
def test_names_of_wrappers_buffers_and_padding_rows_are_understood(tmp_path: Path) -> None:
    weights = dict(folders.hf_demo_weights())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.zeros(64, weights[name].shape[1], dtype=weights[name].dtype)
        weights[name] = torch.cat([weights[name], rows])
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in weights.items()}
    wrapped["_orig_mod.module.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    source = folders.fine_tune(tmp_path / "source", config=folders.hf_config(vocab_size=32832), weights=wrapped)
    convert_checkpoint(source, tmp_path / "hf")
    found = tensors_of(tmp_path / "hf")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert all(check.is_ok for check in verify_checkpoint(tmp_path / "hf"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "modelopt", None])
def test_weights_that_another_program_quantized_are_refused_once(tmp_path: Path, method: str | None) -> None:
    settings = {"quant_method": method, "bits": 4} if method else {"bits": 4}
    source = folders.fine_tune(tmp_path / "source", config=folders.hf_config(quantization_config=settings))
    named = f"by {method}" if method else "by an unknown method"
    message = (
        f"{source}: its weights are quantized {named}, which this package neither reads nor undoes; take the "
        "checkpoint it was made of, or load this one with transformers' own classes"
    )
    for options in ({}, {"quantize": "int4"}, {"to": "consolidated"}):
        with pytest.raises(CheckpointError) as raised:
            prepare_conversion(source, tmp_path / "out", **options)  # type: ignore[arg-type]  # a table of options
        assert str(raised.value) == message


def pickled(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"")


def tied(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(folders.hf_config(tie_word_embeddings=True)))
    for path in folder.glob("*.safetensors"):
        save_file({k: v for k, v in load_file(path).items() if k != "lm_head.weight"}, path)
    (folder / "model.safetensors.index.json").unlink()


def mixed(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        save_file({name: tensor.float() for name, tensor in load_file(path).items()}, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (pickled, "only 'pytorch_model-00001-of-00001.bin': pickles are not read, as they may run code; take the"),
        (tied, "give lm_head a copy of the embeddings, set config.tie_word_embeddings to False, and save it"),
        (mixed, "tensors of dtypes BF16, F32: a checkpoint has one; ask for a dtype to have them converted"),
    ],
)
def test_what_cannot_be_converted_has_one_reason(tmp_path: Path, change: Callable[[Path], None], reason: str) -> None:
    source = folders.fine_tune(tmp_path / "source")
    change(source)
    with pytest.raises(CheckpointError) as raised:
        prepare_conversion(source, tmp_path / "out")
    heading, *problems = str(raised.value).splitlines()
    assert "nothing was done" in heading
    assert len(problems) == 1
    assert reason in problems[0]


@pytest.mark.slow
def test_inspect_says_what_prompts_are_and_that_stock_classes_would_load_it(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(chatml(tmp_path / "tune"))
    assert (inspection.vocabulary, inspection.problems) == ("v7", ())
    assert inspection.prompts is not None
    assert inspection.prompts.startswith("its own chat template: prompts are what it renders")
    assert inspection.notes == (
        "model type mistral: the Auto classes load stock ones, also with modeling_mistral_large imported, as its name "
        f'does not say Mistral-Large; modeling_mistral_large.load("{tmp_path / "tune"}") or `mistral-large adopt` load '
        "ours",
    )
    named = inspect_checkpoint(folders.fine_tune(tmp_path / "my-mistral-large-tune"))
    assert (named.vocabulary, named.problems) == ("v3", ())
    assert "load stock ones unless modeling_mistral_large is imported" in named.notes[0]
    assert inspect_checkpoint(folders.ours(tmp_path / "ours")).notes == ()


@pytest.mark.slow
def test_the_card_of_2411_names_2411(tmp_path: Path) -> None:
    source = folders.vendor(tmp_path / "source", "v7")
    (source / "LICENSE").unlink()
    convert_checkpoint(source, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "base_model: mistralai/Mistral-Large-Instruct-2411\n" in card
    assert "\n# Mistral-Large-Instruct-2411, converted\n" in card
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated")
    assert "Mistral-Large-Instruct-2411" in (tmp_path / "back" / "README.md").read_text()
    assert (tmp_path / "back" / "tokenizer.model.v7").read_bytes() == tokenizer_model_file("v7").read_bytes()
    assert all(check.is_ok for check in verify_checkpoint(tmp_path / "back"))


CARD_OF_A_TUNE = """\
---
license: other
license_name: mrl
base_model:
- mistralai/Mistral-Large-Instruct-2411
- somebody/other
tags: [merge, mistral, "odd\ntag"]
language: en
library_name: transformers
---
# My merge

*This is* what `[INST]` does. \udcff
"""


@pytest.fixture
def tune_with_card(tmp_path: Path) -> Path:
    source = folders.fine_tune(tmp_path / "tune", "v7")
    (source / "README.md").write_bytes(CARD_OF_A_TUNE.encode(errors="surrogateescape"))
    return source


@pytest.mark.slow
@pytest.mark.parametrize("has_metadata", [True, False])
def test_the_card_of_a_fine_tune_is_carried_on(tune_with_card: Path, tmp_path: Path, has_metadata: bool) -> None:
    text = CARD_OF_A_TUNE.replace(" \udcff", "")
    body = text.partition("---\n")[2].partition("---\n")[2]
    if not has_metadata:
        # As far as a parser gets.
        body = text = text.replace("license: other", "license: [")
    (tune_with_card / "README.md").write_text(text)
    convert_checkpoint(tune_with_card, tmp_path / "hf")
    adopt_checkpoint(tune_with_card, tmp_path / "adopted")
    convert_checkpoint(tmp_path / "hf", tmp_path / "again", quantize="fp8")
    convert_checkpoint(tune_with_card, tmp_path / "consolidated", to="consolidated")
    convert_checkpoint(tmp_path / "consolidated", tmp_path / "back")
    retag_checkpoint(tmp_path / "adopted", "mistral")
    for name in ("hf", "adopted", "again", "consolidated", "back"):
        card = (tmp_path / name / "README.md").read_text()
        own, mark, carried = card.partition("\n## The model card of the source\n\n")
        assert mark
        assert carried == body
        assert "# Converted checkpoint\n\n**This checkpoint was modified.**" in own
        metadata: Any = metadata_load(tmp_path / name / "README.md")
        assert metadata["library_name" if name != "consolidated" else "pipeline_tag"] == {
            "adopted": "transformers",
            "consolidated": "text-generation",
        }.get(name, "modeling-mistral-large")
        assert metadata["license"] == "other"
        if has_metadata:
            assert metadata["base_model"] == ["mistralai/Mistral-Large-Instruct-2411", "somebody/other"]
            assert (metadata["license_name"], metadata["language"]) == ("mrl", "en")
            tag = {"adopted": "mistral", "consolidated": "mistral-common"}.get(name, "mistral_large")
            assert metadata["tags"] == [tag, "merge"]
        checks = {check.name: check for check in verify_checkpoint(tmp_path / name)}
        assert checks["licence"].is_ok
        assert checks["files"].is_ok


@pytest.mark.slow
def test_a_card_keeps_its_bytes_and_takes_no_title(tune_with_card: Path, tmp_path: Path) -> None:
    path = tune_with_card / "README.md"
    path.write_bytes(path.read_bytes() + b"\n# Mistral-Large-Instruct-2407, converted\n\xff")
    carried = path.read_bytes()
    files = prepare_conversion(tune_with_card, tmp_path / "hf").small_files
    # Not UTF-8, so that its front matter is not read either.
    assert files["README.md"].endswith(b"\n## The model card of the source\n\n" + carried)
    assert b"\n# Converted checkpoint\n" in files["README.md"]
    convert_checkpoint(tune_with_card, tmp_path / "hf")
    again = prepare_conversion(tmp_path / "hf", tmp_path / "again", quantize="fp8").small_files
    assert b"\n# Converted checkpoint\n" in again["README.md"]
    assert again["README.md"].endswith(b"\n## The model card of the source\n\n" + carried)
