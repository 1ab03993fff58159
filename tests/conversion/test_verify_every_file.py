"""`verify` and every file of a folder: whatever is changed, removed or added, it never says that all is proven."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint, inspect_checkpoint, read_manifest
from mistral_large_conversion.folder_checks import READ_BY_LOADERS, manifest_problems
from mistral_large_conversion.manifest import ManifestFile
from mistral_large_conversion.verify import Check, verify_checkpoint
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.checkpoints import tokenizer_model_file
from tests.support.edits import edit_json, set_json

MANIFEST = "conversion.manifest.json"
# Of a file: changed settings, and changed bytes besides its first and its last.
VARIANTS = int(os.environ.get("MISTRAL_LARGE_CHANGED_SETTINGS", "24"))
PLACES = int(os.environ.get("MISTRAL_LARGE_CHANGED_BYTES", "2"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("source"))


def tiny_checkpoint(folder: Path) -> Path:
    """A model with the real vocabulary that is as small as one can be, saved by transformers."""
    config = MistralLargeConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(1)
    MistralLargeForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    MistralLargeTokenizer(vocab_file=str(tokenizer_model_file())).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conversions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A conversion of each kind, in shards, so that there is an index."""
    folder = tmp_path_factory.mktemp("converted")
    tiny_checkpoint(folder / "saved")
    convert_checkpoint(folder / "saved", folder / "back", to="consolidated", max_shard_size="3MB")
    options: dict[str, dict[str, Any]] = {
        "hf": {},
        "stock": {"model_type": "mistral"},
        "quantized": {"quantize": "int4"},
    }
    for kind, option in options.items():
        convert_checkpoint(folder / "back", folder / kind, max_shard_size="3MB", **option)
    return {kind: folder / kind for kind in ("saved", "back", *options)}


@pytest.fixture(params=["hf", "stock", "quantized", "back"])
def converted(request: pytest.FixtureRequest, conversions: dict[str, Path]) -> Path:
    """One of them; a test leaves it as it was."""
    return conversions[request.param]


@pytest.fixture(scope="module")
def hf(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion in the HF layout; a test leaves it as it was."""
    return Path(shutil.copytree(demo_folder, tmp_path_factory.mktemp("copied") / "hf"))


def is_all_proven(folder: Path) -> bool:
    return all(check.is_ok for check in verify_checkpoint(folder))


def wrong(folder: Path) -> list[str]:
    return [check.name for check in verify_checkpoint(folder) if check.is_ok is False]


def with_values_changed(value: Any) -> Iterator[Any]:
    """The same JSON with one value changed, once for each value in it; of a long list, its first and its last."""
    if isinstance(value, dict):
        for key in value:
            yield {name: member for name, member in value.items() if name != key}
            for changed in with_values_changed(value[key]):
                yield {**value, key: changed}
        yield {**value, "added": 1}
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1}) if value else []:
            for changed in with_values_changed(value[index]):
                yield [*value[:index], changed, *value[index + 1 :]]
        yield [*value, None]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value + 1
    else:
        yield None if isinstance(value, str) else "x"


@pytest.fixture
def only_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the slow checks: what is asked here is whether the files' own check sees it."""
    monkeypatch.setattr("mistral_large_conversion.verify._tokenizer_problems", lambda *_: [])


@pytest.mark.slow
def test_a_conversion_is_all_proven(converted: Path) -> None:
    assert [check for check in verify_checkpoint(converted) if not check.is_ok] == []
    manifest = read_manifest(converted)
    assert manifest is not None
    assert manifest.files is not None
    assert set(manifest.files) == {path.name for path in converted.iterdir()} - {MANIFEST}
    assert inspect_checkpoint(converted).problems == ()


@pytest.mark.slow
@pytest.mark.usefixtures("only_the_files")
def test_no_changed_byte_of_any_file_is_called_proven(converted: Path) -> None:
    rng = random.Random(7)
    for path in sorted(converted.iterdir()):
        content = path.read_bytes()
        places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(PLACES))}
        for place in places:
            changed = bytearray(content)
            changed[place] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            assert wrong(converted), (path.name, place)
        for changed_content in (b"", content[:-1], content + b"\n", b"\xef\xbb\xbf" + content):
            path.write_bytes(changed_content)
            assert wrong(converted), (path.name, changed_content[:20])
        path.unlink()
        assert not is_all_proven(converted), path.name
        if path.name != MANIFEST:
            assert wrong(converted), path.name
        path.write_bytes(content)
    assert is_all_proven(converted)


@pytest.mark.slow
@pytest.mark.usefixtures("only_the_files")
def test_no_changed_value_of_any_setting_is_called_proven(converted: Path) -> None:
    tested = 0
    for path in sorted(converted.glob("*.json")):
        # The vocabulary has a test of its own.
        if path.name == "tokenizer.json":
            continue
        content = path.read_bytes()
        variants = list(with_values_changed(json.loads(content)))
        for changed in variants if len(variants) < VARIANTS else random.Random(3).sample(variants, VARIANTS):
            path.write_text(json.dumps(changed, indent=2) + "\n")
            assert not is_all_proven(converted), (path.name, changed)
            tested += 1
        path.write_bytes(content)
    assert tested > VARIANTS
    assert is_all_proven(converted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "added_tokens.json",
        "chat_template.json",
        "chat_template_x.jinja",
        "consolidated.00.pth",
        "custom_modeling.py",
        "model.gguf",
        "model.fp32.safetensors",
        "MODEL.SAFETENSORS",
        "preprocessor_config.json",
        "processor_config.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "requirements.txt",
        "special_tokens_map.json",
        "tekken.json",
        "tokenizer.model",
        "tokenizer.model.v7",
        "vocab.json",
    ],
)
@pytest.mark.usefixtures("only_the_files")
def test_a_file_that_a_loader_reads_is_wrong_where_a_conversion_wrote_none(hf: Path, name: str) -> None:
    (hf / name).write_bytes(b"{}")
    try:
        assert wrong(hf)
        assert any(name in problem for problem in inspect_checkpoint(hf).problems)
    finally:
        (hf / name).unlink()


@pytest.mark.parametrize("name", ["additional_chat_templates", "custom_generate"])
@pytest.mark.usefixtures("only_the_files")
def test_a_folder_that_a_loader_reads_is_wrong(hf: Path, name: str) -> None:
    (hf / name).mkdir()
    (hf / name / "tool_use.jinja").write_text("{{ messages }}")
    try:
        (check,) = (check for check in verify_checkpoint(hf) if check.name == "files")
        assert check == Check("files", False, f"'{name}' was added since the conversion: a loader may read it")
    finally:
        shutil.rmtree(hf / name)


@pytest.mark.usefixtures("only_the_files")
def test_what_nobody_reads_is_named_and_not_wrong(hf: Path) -> None:
    (hf / "notes.txt").write_text("mine")
    (hf / ".gitattributes").write_text("")
    (hf / "runs").mkdir()
    try:
        assert wrong(hf) == []
        (check,) = (check for check in verify_checkpoint(hf) if not check.is_ok)
        assert check.is_ok is None
        assert check.detail.endswith("; not proven, added since: '.gitattributes', 'notes.txt', 'runs'")
    finally:
        (hf / "notes.txt").unlink()
        (hf / ".gitattributes").unlink()
        (hf / "runs").rmdir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../README.md", "/etc/passwd", "a\0b", "\ud800", "a" * 5000, ""])
def test_a_manifest_may_name_anything(folder: Path, name: str) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"][name] = content["files"]["README.md"]
    (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest_problems(folder, manifest) == [f"{name} is missing"]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
@pytest.mark.usefixtures("only_the_files")
def test_a_link_in_the_place_of_a_file_is_wrong(hf: Path, tmp_path: Path) -> None:
    path = hf / "README.md"
    content = path.read_bytes()
    (tmp_path / "elsewhere").write_bytes(content)
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    try:
        assert "files" in wrong(hf)
    finally:
        path.unlink()
        path.write_bytes(content)


def edit_tokenizer(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "tokenizer.json", edit)


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    rng = random.Random(3)
    for _ in range(100):
        one, other = rng.randrange(len(merges)), rng.randrange(len(merges))
        merges[one], merges[other] = merges[other], merges[one]


def swap_pieces(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["▁Hello"], vocabulary["▁Paris"] = vocabulary["▁Paris"], vocabulary["▁Hello"]


TOKENIZER_EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "merges swapped": (swap_merges, "model not as made from tokenizer.model.v3"),
    "merges gone": (
        lambda content: content["model"]["merges"].__delitem__(slice(2000, 2001)),
        "model not as made from tokenizer.model.v3",
    ),
    "pieces swapped": (swap_pieces, "other pieces than v3's"),
    "dropout": (lambda content: content["model"].update(dropout=0.1), "model not as made from tokenizer.model.v3"),
    "another post-processor": (
        lambda content: (
            content["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
            or content["post_processor"]["special_tokens"].update(
                {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}
            )
        ),
        "post_processor not as made from tokenizer.model.v3",
    ),
    "a control token that is text": (
        lambda content: content["added_tokens"].__delitem__(4),
        "added_tokens not as made from tokenizer.model.v3",
    ),
    "a control token that strips": (
        lambda content: content["added_tokens"][3].update(rstrip=True),
        "added_tokens not as made from tokenizer.model.v3",
    ),
    "a token without a row": (
        lambda content: content["added_tokens"].append({**content["added_tokens"][3], "id": 32768, "content": "<im>"}),
        "tokenizer.json has 32769 tokens, the weights have 32768 rows",
    ),
}


@pytest.mark.slow
# Whatever the edit, the manifest only says that the file has changed.
@pytest.mark.parametrize(
    ("edit", "has_manifest"), [("merges swapped", True), *((edit, False) for edit in TOKENIZER_EDITS)]
)
def test_any_other_tokenizer_is_found_without_the_manifest_too(folder: Path, edit: str, has_manifest: bool) -> None:
    act, problem = TOKENIZER_EDITS[edit]
    edit_tokenizer(act)(folder)
    if not has_manifest:
        (folder / MANIFEST).unlink()
    found = {check.name: check.detail for check in verify_checkpoint(folder) if check.is_ok is False}
    assert found.keys() == ({"tokenizer", "files"} if has_manifest else {"tokenizer"})
    assert problem in found["tokenizer"]


@pytest.mark.slow
def test_swapped_merges_do_change_ids(folder: Path, reference_tokenizer: Any) -> None:
    """The damage that the test above wants found is one: text gets other ids."""
    text = " ".join(MistralLargeTokenizer.from_pretrained(folder).pieces[5000:9000])
    edit_tokenizer(swap_merges)(folder)
    request = ChatCompletionRequest(messages=[UserMessage(content=text)])
    ids = MistralLargeTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": text}], return_dict=False
    )
    assert ids != reference_tokenizer.encode_chat_completion(request).tokens


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["hf", "consolidated"])
def test_an_altered_vocabulary_is_never_called_the_vendors(
    folder: Path, source: Path, tmp_path: Path, layout: str
) -> None:
    """One score changed: the pieces are the same, and the ids of some texts are not."""
    if layout == "consolidated":
        folder = Path(shutil.copytree(source, tmp_path / "consolidated"))
    path = folder / "tokenizer.model.v3"
    content = path.read_bytes()
    # The score of a piece of text, as a float after its tag.
    place = content.index("▁Hello".encode()) + len("▁Hello".encode()) + 1
    path.write_bytes(content[: place + 2] + bytes([content[place + 2] ^ 0x40]) + content[place + 3 :])
    found = {check.name: check.detail for check in verify_checkpoint(folder) if check.is_ok is False}
    assert "tokenizer" in found
    assert "scores" in found["tokenizer"]


def unproven(folder: Path, source: Path | None = None) -> dict[str, str]:
    checks = verify_checkpoint(folder, source)
    assert all(check.is_ok is not False for check in checks), checks
    return {check.name: check.detail for check in checks if check.is_ok is None}


@pytest.mark.slow
def test_without_a_manifest_what_is_not_proven_is_said(folder: Path, source: Path) -> None:
    (folder / MANIFEST).unlink()
    no_manifest = "not proven: no manifest; convert again for one; made again from "
    found = unproven(folder)
    assert found == {
        "config": "matches the weights; not proven: numbers of heads, head_dim, norm_eps, rope_theta, "
        "max_position_embeddings; give the source",
        "tensors": "not compared: the folder has no manifest; give the source",
        "licence": "not proven: no manifest to compare it with; give the source",
        "files": f"{no_manifest}itself: the same small files",
    }
    assert unproven(folder, source) == {"files": f"{no_manifest}the source: the same small files"}
    set_json(folder / "generation_config.json", suppress_tokens=[2])
    set_json(folder / "tokenizer_config.json", add_bos_token=False, bos_token="</s>")
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer.model").write_bytes(b"")
    assert unproven(folder)["files"] == (
        f"{no_manifest}itself: tokenizer_config.json differs in 'add_bos_token', 'bos_token'; README.md differs; "
        "generation_config.json differs in 'suppress_tokens'; 'tokenizer.model' is extra"
    )


@pytest.mark.slow
def test_a_manifest_of_before_is_not_proven_and_not_wrong(folder: Path) -> None:
    edit_json(folder / MANIFEST, lambda content: content.pop("files"))
    found = unproven(folder)
    assert found.keys() == {"config", "licence", "files"}
    assert found["files"].startswith("not proven: a manifest without checksums of files; convert again for one; made")


@pytest.mark.slow
def test_what_transformers_saved_is_sound_and_not_proven(conversions: dict[str, Path], tmp_path: Path) -> None:
    saved = Path(shutil.copytree(conversions["saved"], tmp_path / "saved"))
    for name in ("LICENSE", "README.md"):
        (saved / name).write_text("mine")
    assert unproven(saved).keys() == {"config", "tensors", "licence", "files"}


@pytest.mark.slow
def test_a_model_that_is_saved_over_a_conversion_is_not_what_was_converted(folder: Path) -> None:
    model = MistralLargeForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[7] += 1
    model.save_pretrained(folder)
    assert wrong(folder) == ["tensors", "files"]


@pytest.mark.slow
def test_every_kind_of_name_that_a_conversion_writes_is_one_that_loaders_read(converted: Path) -> None:
    names = [path.name for path in converted.iterdir() if path.name not in ("LICENSE", "Notice", "README.md")]
    assert all(any(fnmatchcase(name, pattern) for pattern in READ_BY_LOADERS) for name in names)
    assert ManifestFile.of(b"") == ManifestFile(0, "99aa06d3014798d86001c324468d497f")
