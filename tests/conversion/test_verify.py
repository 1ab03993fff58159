"""`mistral-large verify`: a sound checkpoint passes, and one changed bit is named."""

import json
import os
import shutil
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from safetensors.torch import load_file, save_file

import mistral_large_conversion.verify as verify_module
from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_conversion import convert_checkpoint, planned_tensor
from mistral_large_conversion.checkpoint.safetensors_header import FileTensor
from mistral_large_conversion.errors import CheckpointError
from mistral_large_conversion.verify import Check, verify_checkpoint
from tests.support.command import run
from tests.support.edits import Edit, content, edit_json, remove, set_json, setting
from tests.support.errors import raises_exactly

pytestmark = pytest.mark.ground_floor


@pytest.fixture(scope="module")
def demo_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def back_folder(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in the consolidated layout, by way of the HF layout, in more files than before."""
    folder = tmp_path_factory.mktemp("back")
    convert_checkpoint(demo_folder, folder, to="consolidated", max_shard_size="1MB")
    return folder


def by_name(checks: list[Check]) -> dict[str, Check]:
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def wrong(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if check.is_ok is False}


def flip_bit(folder: Path, name: str, byte: int) -> None:
    """Change the lowest bit of one byte of a tensor."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + start + byte] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_a_changed_word_in_a_header_is_found_where_a_conversion_wrote_it(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'{"format":"pt"}', b'{"format":"pu"}', 1))
    assert wrong(verify_checkpoint(folder)) == {"files": "model.safetensors has changed since the conversion"}
    # A folder of another program has its own.
    (folder / "conversion.manifest.json").unlink()
    assert wrong(verify_checkpoint(folder)) == {}


@pytest.mark.slow
def test_every_way_between_the_layouts_is_verified(demo_source: Path, demo_folder: Path, back_folder: Path) -> None:
    for folder, source in [
        (demo_folder, demo_source),
        (demo_source, demo_folder),
        (back_folder, demo_folder),
        (back_folder, demo_source),
        (demo_folder, back_folder),
        (demo_folder, demo_folder),
    ]:
        counts: list[int] = []
        checks = by_name(verify_checkpoint(folder, source, progress=counts.append))
        # The source was not written by a conversion: nothing proves its small files.
        unproven = [name for name, check in checks.items() if not check.is_ok]
        assert unproven == (["files"] if folder == demo_source else []), (folder, source, checks)
        assert checks["files"].is_ok is not False
        assert checks["tensors"].detail == "all 30 have the source's bits"
        assert checks["headers"].detail == "30 tensors, BF16, match the config"
        assert sum(counts) == 2 * 4_440_512
        assert len(counts) == 30
        assert ("chat template" in checks) == (folder == demo_folder)


@pytest.mark.parametrize(
    "name", ["k_proj", *(pytest.param(f"{name}_proj", marks=pytest.mark.slow) for name in ("q", "v", "o"))]
)
@pytest.mark.parametrize("is_back", [False, True])
def test_one_changed_bit_is_named_with_its_place_and_both_values(
    folder: Path, demo_source: Path, name: str, is_back: bool
) -> None:
    tensor = f"model.layers.1.self_attn.{name}.weight"
    # A copy, because the file is mapped into memory.
    before = load_file(folder / "model.safetensors")[tensor].clone()
    row, column = 37, 5
    flip_bit(folder, tensor, 2 * (row * before.shape[1] + column))
    after = load_file(folder / "model.safetensors")[tensor]
    if not is_back:
        detail = f"{tensor} at [{row}, {column}]: {after[row, column].item()!r}, the source has "
        detail += repr(before[row, column].item())
        assert wrong(verify_checkpoint(folder, demo_source)) == {"tensors": f"1 of 30 differ, first {detail}"}
    else:
        # Row 37 is the sixth of the second head, the first of pair 5: row 10 of that head in the other layout.
        other_row = {"q_proj": 42, "k_proj": 42}.get(name, row)
        other = f"layers.1.attention.w{name[0]}.weight"
        detail = f"{other} at [{other_row}, {column}]: {before[row, column].item()!r}, the source has "
        detail += repr(after[row, column].item())
        assert wrong(verify_checkpoint(demo_source, folder)) == {"tensors": f"1 of 30 differ, first {detail}"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.model", "missing"])
def test_the_tokenizer_is_compared_under_its_other_name(
    demo_folder: Path, demo_source: Path, tmp_path: Path, name: str
) -> None:
    source = Path(shutil.copytree(demo_source, tmp_path / "source"))
    (source / "tokenizer.model.v3").rename(tmp_path / "source" / name)
    check = by_name(verify_checkpoint(demo_folder, source))["tokenizer"]
    if name == "missing":
        assert (check.is_ok, "not compared with the source: tokenizer.model.v3 is missing" in check.detail) == (
            None,
            True,
        )
        return
    assert (check.is_ok, check.detail) == (True, "the vendor's, made again from it")
    # Known by its pieces, scores and types; the names of pieces that the format does not use are others.
    path = source / name
    path.write_bytes(path.read_bytes().replace(b"\n\x05[IMG]", b"\n\x05[IMH]", 1))
    check = by_name(verify_checkpoint(demo_folder, source))["tokenizer"]
    assert (check.is_ok, check.detail) == (False, "tokenizer.model.v3 is not the source's")
    check = by_name(verify_checkpoint(source))["tokenizer"]
    assert (check.is_ok, check.detail) == (True, "the vendor's, made again from it")


@pytest.mark.slow
def test_the_first_of_several_differences_is_named(folder: Path, demo_source: Path) -> None:
    for name in ("model.norm.weight", "model.layers.2.mlp.up_proj.weight", "lm_head.weight"):
        flip_bit(folder, name, 0)
    (detail,) = wrong(verify_checkpoint(folder, demo_source)).values()
    assert detail.startswith("3 of 30 differ, first model.layers.2.mlp.up_proj.weight at [0, 0]: ")


@pytest.mark.slow
def test_the_place_of_a_difference_is_right_beyond_the_first_block(folder: Path, demo_source: Path) -> None:
    flip_bit(folder, "lm_head.weight", 2 * (32_767 * 64 + 63))
    (detail,) = wrong(verify_checkpoint(folder, demo_source)).values()
    assert "lm_head.weight at [32767, 63]: " in detail


@pytest.mark.slow
def test_small_buffers_find_the_same(folder: Path, demo_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip_bit(folder, "model.layers.1.self_attn.q_proj.weight", 2 * (100 * 64 + 9))
    expected = verify_checkpoint(folder, demo_source)
    monkeypatch.setattr(planned_tensor, "BLOCK_BYTES", 1000)
    assert verify_checkpoint(folder, demo_source) == expected
    assert "q_proj.weight at [100, 9]: " in wrong(expected)["tensors"]


@pytest.mark.slow
def test_a_nan_is_compared_by_its_bits(folder: Path, demo_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo_source, tmp_path / "source"))
    # Another program writes the files.
    (folder / "conversion.manifest.json").unlink()
    for path, name in ((folder / "model.safetensors", "model.norm.weight"), (None, "norm.weight")):
        path = path or next(path for path in source.glob("*.safetensors") if name in load_file(path))
        tensors = load_file(path)
        tensors[name][3] = float("nan")
        save_file(tensors, path)
    assert wrong(verify_checkpoint(folder, source)) == {}
    # The NaN of the file is 0x7fc0.
    flip_bit(folder, "model.norm.weight", 6)
    assert "model.norm.weight at [3]: nan, the source has nan" in wrong(verify_checkpoint(folder, source))["tensors"]


@pytest.mark.slow
def test_a_cast_checkpoint_is_compared_with_the_rounded_source(
    demo_folder: Path, demo_source: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(demo_source, tmp_path / "source"))
    for path in source.glob("*.safetensors"):
        # Beyond what bfloat16 holds, so that rounding matters.
        save_file({name: tensor.float() * 1.000001 for name, tensor in load_file(path).items()}, path)
    checks = by_name(verify_checkpoint(demo_folder, source))
    assert checks["tensors"] == Check("tensors", True, "all 30 have the source's bits, rounded to BF16")
    # A source of several dtypes can be converted to one.
    path = next(source.glob("*.safetensors"))
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert by_name(verify_checkpoint(demo_folder, source)) == checks


def tokenizer_piece(folder: Path) -> None:
    """Swap two merges, after which the pieces are the same and the ids are not."""

    def swap(content: dict[str, Any]) -> None:
        merges = content["model"]["merges"]
        merges[0], merges[-1] = merges[-1], merges[0]

    edit_json(folder / "tokenizer.json", swap)


DAMAGES: dict[str, tuple[Edit, str, str]] = {
    "marker left": (content("conversion.unfinished", b""), "finished", "conversion.unfinished: an unfinished conver"),
    "partial file left": (content("model.safetensors.partial", b""), "finished", "model.safetensors.partial: an unf"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 10**6), "headers", "is cut short"),
    "no weights": (remove("model.safetensors"), "headers", "no model.safetensors"),
    "no config": (remove("config.json"), "headers", "config.json is missing"),
    "config of another width": (setting("config.json", hidden_size=80), "headers", "this geometry needs [80]"),
    "config with another theta": (
        setting("config.json", rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        "config",
        "rope_theta is 10000.0, the source's is 1000000.0",
    ),
    "config with other heads": (
        setting("config.json", num_attention_heads=2, num_key_value_heads=2, head_dim=96),
        "headers",
        "k_proj.weight' has shape [64, 64], this geometry needs [192, 64]",
    ),
    "config of another dtype": (
        setting("config.json", dtype="float16"),
        "config",
        "dtype is 'float16', the weights are",
    ),
    "config of another class": (setting("config.json", architectures=["X"]), "config", "architectures ['X'] of a mis"),
    "no generation config": (remove("generation_config.json"), "config", "generation_config.json is missing"),
    "generation config not JSON": (content("generation_config.json", b"{"), "config", "generation_config.json: Expe"),
    "generation config with another end": (
        setting("generation_config.json", eos_token_id=0),
        "config",
        "eos_token_id is 0, config.json has 2",
    ),
    "no tokenizer model": (remove("tokenizer.model.v3"), "tokenizer", "tokenizer.model.v3 is missing"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer", "no such file"),
    "tokenizer not JSON": (content("tokenizer.json", b"{"), "tokenizer", "not a tokenizer.json"),
    "tokenizer inexact": (tokenizer_piece, "tokenizer", "model not as made from tokenizer.model.v3"),
    "tokenizer model foreign": (content("tokenizer.model.v3", b"x"), "tokenizer", "is not the source's"),
    "no chat template": (remove("chat_template.jinja"), "chat template", "chat_template.jinja is missing"),
    "another chat template": (content("chat_template.jinja", b"{{ x }}"), "chat template", "is not the bundled one"),
    "no licence": (remove("LICENSE"), "licence", "LICENSE is not the source's"),
    "another licence": (content("LICENSE", b"mine"), "licence", "LICENSE is not the source's"),
    "no model card": (remove("README.md"), "licence", "no README.md, which states the modification"),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_where_it_is(folder: Path, demo_source: Path, damage: str) -> None:
    act, name, detail = DAMAGES[damage]
    act(folder)
    found = wrong(verify_checkpoint(folder, demo_source))
    # What a conversion has written, it has in its manifest.
    assert set(found) == ({name} if name == "finished" else {name, "files"})
    assert detail in found[name]


@pytest.mark.slow
def test_without_a_source_the_licence_of_the_vendor_needs_both_files(folder: Path) -> None:
    (folder / "conversion.manifest.json").unlink()
    (folder / "Notice").write_text("Licensed by Mistral AI under the Mistral AI Research License\n")
    assert wrong(verify_checkpoint(folder)) == {}
    (folder / "LICENSE").unlink()
    assert wrong(verify_checkpoint(folder)) == {"licence": "no LICENSE"}
    (folder / "Notice").unlink()
    assert wrong(verify_checkpoint(folder)) == {"licence": "no LICENSE: it must go with the weights"}


@pytest.mark.slow
def test_without_a_source_the_checksums_of_the_manifest_are_compared(folder: Path) -> None:
    checks = by_name(verify_checkpoint(folder))
    assert checks["tensors"] == Check("tensors", True, "all 30 have the manifest's checksums")
    flip_bit(folder, "model.norm.weight", 5)
    (detail,) = wrong(verify_checkpoint(folder)).values()
    assert detail.startswith("1 of 30 differ, first model.norm.weight: ")
    flip_bit(folder, "model.norm.weight", 5)
    path = folder / "conversion.manifest.json"
    edit_json(path, lambda manifest: manifest["tensors"]["model.norm.weight"].update(shape=[32, 2]))
    assert wrong(verify_checkpoint(folder)).keys() == {"tensors", "files"}
    path.write_text("{")
    found = wrong(verify_checkpoint(folder))
    assert found.keys() == {"tensors", "files"}
    assert all("not a manifest of a conversion" in detail for detail in found.values())
    path.unlink()
    checks = by_name(verify_checkpoint(folder))
    assert checks["tensors"] == Check("tensors", None, "not compared: the folder has no manifest; give the source")


@pytest.mark.slow
def test_another_geometry_is_not_compared(folder: Path, demo_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(demo_source, tmp_path / "source"))
    # The same shapes, with other heads.
    set_json(source / "params.json", n_heads=12, n_kv_heads=4, head_dim=16)
    found = wrong(verify_checkpoint(folder, source))
    assert set(found) == {"config", "tensors"}
    assert found["tensors"] == "not compared: the source has other shapes"


def test_a_file_that_cannot_be_read_is_an_error(
    demo_folder: Path, demo_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: FileTensor) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(FileTensor, "open", fail)
    with raises_exactly(CheckpointError, f"{demo_folder}: cannot be compared: [Errno 5] Input/output error"):
        verify_checkpoint(demo_folder, demo_source)


def test_a_file_that_becomes_shorter_meanwhile_is_an_error(
    demo_folder: Path, demo_source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FileTensor.open

    def shorter(self: FileTensor) -> BinaryIO:
        with original(self) as stream:
            data = stream.read(self.size)
        return BytesIO(data[:-1] if self.name == "model.norm.weight" else data)

    monkeypatch.setattr(FileTensor, "open", shorter)
    with raises_exactly(
        CheckpointError,
        "tensor 'model.norm.weight' ends early: its file has changed since it was checked",
    ):
        verify_checkpoint(demo_folder, demo_source)


@pytest.mark.slow
def test_the_command_says_it_in_a_table_in_json_and_in_its_exit_code(
    folder: Path, demo_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", folder, demo_source) == 0
    rows = [line.strip().split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["check", "result", "detail"]
    assert ["tensors", "ok", "all 30 have the source's bits"] in rows
    flip_bit(folder, "model.norm.weight", 0)
    assert run("verify", folder, demo_source) == 1
    assert "tensors        wrong" in capsys.readouterr().out
    assert run("verify", folder, demo_source, "--json") == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False
    assert [check["name"] for check in printed["checks"] if check["is_ok"] is False] == ["tensors"]
    assert run("verify", folder / "nothing") == 2
    assert capsys.readouterr().err.startswith("mistral-large: ")


@pytest.mark.parametrize("missing", ["folder", "source"])
def test_what_is_no_checkpoint_is_an_error(demo_folder: Path, tmp_path: Path, missing: str) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"folder": demo_folder, "source": demo_folder, missing: tmp_path / "empty"}
    problem = {
        "folder": ": no checkpoint; give a folder with params.json or config.json",
        "source": (
            " is not a complete consolidated checkpoint; nothing was done, fix or download it again:\n"
            "  params.json is missing\n"
            "  no consolidated.safetensors and no consolidated-00001-of-….safetensors"
        ),
    }[missing]
    with raises_exactly(CheckpointError, f"{tmp_path}/empty{problem}"):
        verify_checkpoint(folders["folder"], folders["source"])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensors(demo_folder: Path, demo_source: Path) -> None:
    verify_checkpoint(demo_folder, demo_source)
    tracemalloc.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planned_tensor, "BLOCK_BYTES", 2**14)
        patch.setattr(verify_module, "_tokenizer_problems", lambda *_: [])
        assert wrong(verify_checkpoint(demo_folder, demo_source)) == {}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The largest tensor has 4 MB; small files and headers take what is left.
    assert peak < 2_000_000
