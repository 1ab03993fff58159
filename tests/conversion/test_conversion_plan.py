"""The plan: what is found in a folder, and every reason to refuse it, before anything is written."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_large_conversion import (
    convert_checkpoint,
    inspect_checkpoint,
    plan_conversion,
    verify_checkpoint,
)
from mistral_large_conversion.checkpoint.geometry import PUBLISHED, Geometry
from mistral_large_conversion.checkpoint.names import expected_tensors
from mistral_large_conversion.checkpoint.read import FIRST_QUERY
from mistral_large_conversion.checkpoint.safetensors_header import read_header
from mistral_large_conversion.errors import CheckpointError, TokenizerFileError
from mistral_large_conversion.options import parse_size
from tests.support.checkpoints import contents, write_consolidated, write_headers
from tests.support.damage import header_and_data, raw
from tests.support.edits import Edit, content, edit_json, remove, replace, set_json, setting
from tests.support.errors import raises_exactly, whole

pytestmark = pytest.mark.ground_floor

FIRST, SECOND = (f"consolidated-{number:05}-of-00002.safetensors" for number in (1, 2))
INDEX = "consolidated.safetensors.index.json"


@pytest.fixture(scope="module")
def sound_source(tiny_geometry: Geometry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "source"
    torch.manual_seed(1)
    write_consolidated(folder, tiny_geometry, torch.bfloat16)
    return folder


@pytest.fixture
def source(sound_source: Path, tmp_path: Path) -> Path:
    """A sound checkpoint in two files without an index, to be damaged."""
    return Path(shutil.copytree(sound_source, tmp_path / "source"))


def raw_file(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, also one that the library would not write."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return raw(encoded, data, length=length)


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    header, data = header_and_data(path)
    edit(header)
    path.write_bytes(raw_file(header, data))


def write_index(folder: Path) -> Path:
    weight_map = {name: path.name for path in folder.glob("*.safetensors") for name in load_file(path)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / INDEX


def test_the_plan_of_the_123b_is_made_from_headers_alone(tmp_path: Path) -> None:
    write_headers(tmp_path, PUBLISHED, shards=3)
    (tmp_path / "tokenizer.model.v3").write_bytes(b"")
    tensors = expected_tensors(PUBLISHED)
    plan = plan_conversion(tmp_path)
    assert plan.tensor_bytes == 245_220_139_008
    assert [file.name for file in plan.files] == [f"model-{number:05}-of-00051.safetensors" for number in range(1, 52)]
    assert [output.name for file in plan.files for output in file.outputs] == [tensor.hf for tensor in tensors]
    assert max(file.size for file in plan.files) < 5e9 + 1e5
    assert plan.index is not None
    assert plan.index["metadata"] == {"total_size": 245_220_139_008}
    assert len(plan.index["weight_map"]) == 795


@pytest.mark.parametrize("files", [1, 2, 7])
def test_any_number_of_files_with_or_without_index(tiny_geometry: Geometry, tmp_path: Path, files: int) -> None:
    write_consolidated(tmp_path / "source", tiny_geometry, shards=files)
    without_index = plan_conversion(tmp_path / "source")
    write_index(tmp_path / "source")
    assert plan_conversion(tmp_path / "source") == without_index
    assert [file.name for file in without_index.files] == ["model.safetensors"]
    assert without_index.index is None


def test_the_second_copy_of_the_weights_is_not_looked_at(source: Path) -> None:
    expected = plan_conversion(source)
    (source / "model-00001-of-00001.safetensors").write_bytes(b"not even a file of weights")
    (source / "model.safetensors.index.json").write_text("{")
    (source / "config.json").write_text("{")
    assert plan_conversion(source) == expected


def test_a_snapshot_of_the_hub_cache_is_read_through_its_links(source: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repo" / "snapshots" / "c0ffee", tmp_path / "repo" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert len(plan_conversion(snapshot).files) == 1


def test_a_linked_folder_is_read_as_the_folder_itself(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    assert plan_conversion(tmp_path / "link").tensor_bytes == plan_conversion(source).tensor_bytes


def params(**change: Any) -> Edit:
    return setting("params.json", **change)


def entry(**change: Any) -> Edit:
    """Another entry for norm.weight, which is the second of its file."""
    return lambda folder: edit_header(folder / SECOND, lambda header: header["norm.weight"].update(change))


def tensor(name: str, *shape: int, file: str = SECOND, dtype: torch.dtype = torch.bfloat16) -> Edit:
    return lambda folder: edit_tensors(
        folder / file, lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})
    )


def index(**change: Any) -> Edit:
    changes = {name.replace("__", "."): file for name, file in change.items()}
    return lambda folder: edit_json(write_index(folder), lambda index: index["weight_map"].update(changes))


def link_out(name: str) -> Edit:
    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(Path("..", "elsewhere"))

    return act


def both(first: Edit, second: Edit) -> Edit:
    def act(folder: Path) -> None:
        first(folder)
        second(folder)

    return act


def move_norm(distance: int) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        offsets = header["norm.weight"]["data_offsets"]
        header["norm.weight"]["data_offsets"] = [offset + distance for offset in offsets]

    return lambda folder: edit_header(folder / SECOND, edit)


PARAMS, TOKENIZER = "params.json", "tokenizer.model.v3"
SPLIT = "consolidated-{}-of-{}.safetensors"
NO_FILE = f"{SECOND} is not a whole safetensors file"
BROKEN = f"{SECOND} has a broken header"
NORM = f"{SECOND}: 'norm.weight'"

INCOMPLETE = "{} is not a complete {} checkpoint; nothing was done, fix or download it again:\n  {}"
DAMAGES: dict[str, tuple[Edit, str]] = {
    "no params": (remove(PARAMS), "params.json is missing"),
    "params not JSON": (content(PARAMS, b"{"), "params.json: Expecting <*>"),
    "params not text": (content(PARAMS, b"\xff\xfe{"), "params.json: 'utf-8' codec <*>"),
    "params a list": (content(PARAMS, b"[]"), "params.json: must be a JSON object, not list"),
    "params too deep": (content(PARAMS, b'{"dim":' + b"[" * 100_000), "params.json: JSON nested too deeply"),
    "params with a key twice": (
        content(PARAMS, b'{"dim": 80, "dim": 81}'),
        "params.json: key 'dim' twice in one object",
    ),
    "params with a number without end": (
        content(PARAMS, b'{"dim": ' + b"9" * 10_000 + b"}"),
        "params.json: Exceeds the limit <*>",
    ),
    "params with NaN": (
        params(norm_eps=float("nan")),
        "params.json: norm_eps is nan: must be a finite number greater than 0",
    ),
    "params giant": (
        lambda folder: os.truncate(folder / PARAMS, 100_000_001),
        "params.json has more than 100000000 bytes",
    ),
    "params a folder": (replace(PARAMS, Path.mkdir), "params.json is not a regular file"),
    "params a link out": (link_out(PARAMS), "params.json is a link out of the folder, to '<*>'"),
    "params of another width": (params(dim=96), "<*>\n  tensor 'norm.weight' has shape [80], this geometry needs [96]"),
    "params with more layers": (params(n_layers=4), "tensor 'layers.3.attention.wq.weight' is missing\n  <*>"),
    "params with fewer layers": (
        params(n_layers=2),
        "<*>\n  tensor 'layers.2.attention.wq.weight' is extra: this geometry has none of that name\n  <*>",
    ),
    "params with another head_dim": (
        params(head_dim=16),
        "tensor 'layers.0.attention.wk.weight' has shape [64, 80], this geometry needs [32, 80]\n  <*>",
    ),
    "no tokenizer": (remove(TOKENIZER), "tokenizer.model.v3 is missing"),
    "tokenizer a link out": (link_out(TOKENIZER), "tokenizer.model.v3 is a link out of the folder, to '<*>'"),
    "weights a link out": (link_out(SECOND), f"{SECOND} is a link out of the folder, to '<*>'"),
    "weights a dangling link": (replace(SECOND, lambda path: path.symlink_to("nowhere")), f"{SECOND} is missing"),
    "weights a link to itself": (
        replace(SECOND, lambda path: path.symlink_to(SECOND)),
        f"{SECOND} cannot be read: <*>",
    ),
    "weights a pipe": (replace(SECOND, os.mkfifo), f"{SECOND} is not a regular file"),
    "no weights": (remove(FIRST, SECOND), "no consolidated.safetensors and no consolidated-00001-of-….safetensors"),
    "only pickles": (
        both(remove(FIRST, SECOND), content("consolidated.00.pth", b"")),
        "no consolidated.safetensors and no consolidated-00001-of-….safetensors, only 'consolidated.00.pth': pickles "
        "are not read, as they may run code; take the safetensors files, or load it with transformers and save it "
        "again with save_pretrained, which writes them",
    ),
    "a file missing": (remove(SECOND), f"{SECOND} is missing"),
    "a file too many": (
        content(SPLIT.format("00003", "00002"), b""),
        "consolidated-00003-of-00002.safetensors is not one of 00002\n  consolidated-00003-of-00002.safetensors is "
        "not a whole safetensors file: header of 0 in 0 bytes",
    ),
    "two splits": (
        content(SPLIT.format("00001", "00003"), b""),
        f"files of more than one checkpoint: ['{FIRST}', 'consolidated-00001-of-00003.safetensors', '{SECOND}']",
    ),
    "split and single file": (
        content("consolidated.safetensors", b""),
        f"files of more than one checkpoint: ['{FIRST}', '{SECOND}', 'consolidated.safetensors']",
    ),
    "a file of another name": (
        content("consolidated-old.safetensors", b""),
        f"files of more than one checkpoint: ['{FIRST}', '{SECOND}', 'consolidated-old.safetensors']",
    ),
    "empty file": (content(SECOND, b""), f"{NO_FILE}: header of 0 in 0 bytes"),
    "giant header length": (
        content(SECOND, raw_file(b"{}", length=2**63)),
        f"{NO_FILE}: header of 9223372036854775808 in 10 bytes",
    ),
    "header longer than its file": (content(SECOND, raw_file(b"{}", length=3)), f"{NO_FILE}: header of 3 in 10 bytes"),
    "file of a few bytes": (content(SECOND, b"\0\0\0"), f"{NO_FILE}: header of 0 in 3 bytes"),
    "no header": (content(SECOND, raw_file(b"")), f"{BROKEN}: Expecting <*>"),
    "negative header length": (
        content(SECOND, raw_file(b"{}", length=2**64 - 1)),
        f"{NO_FILE}: header of 18446744073709551615 in 10 bytes",
    ),
    "header length over the limit": (
        both(
            content(SECOND, raw_file(b"{}", length=10**8 + 1)), lambda folder: os.truncate(folder / SECOND, 2 * 10**8)
        ),
        f"{NO_FILE}: header of 100000001 in 200000000 bytes",
    ),
    "header not JSON": (content(SECOND, raw_file(b"hello")), f"{BROKEN}: Expecting <*>"),
    "header a list": (content(SECOND, raw_file(b"[]")), f"{BROKEN}: must be a JSON object, not list"),
    "header not text": (content(SECOND, raw_file(b'{"\xff":1}')), f"{BROKEN}: 'utf-8' codec <*>"),
    "header with a tensor twice": (
        content(SECOND, raw_file(b'{"a": 1, "a": 2}')),
        f"{BROKEN}: key 'a' twice in one object",
    ),
    "entry not an object": (
        lambda folder: edit_header(folder / SECOND, lambda header: header.update({"norm.weight": 7})),
        f"{NORM} has another entry than dtype, shape and data_offsets",
    ),
    "entry without offsets": (
        lambda folder: edit_header(folder / SECOND, lambda header: header["norm.weight"].pop("data_offsets")),
        f"{NORM} has another entry than dtype, shape and data_offsets",
    ),
    "entry with more": (entry(scale=1.0), f"{NORM} has another entry than dtype, shape and data_offsets"),
    "unknown dtype": (
        entry(dtype="I4"),
        f"{NORM} has dtype 'I4', must be one of F32, F16, BF16, F8_E4M3, F8_E5M2, U8, I32, I64",
    ),
    "integer dtype": (
        entry(dtype="I16"),
        f"{NORM} has dtype 'I16', must be one of F32, F16, BF16, F8_E4M3, F8_E5M2, U8, I32, I64",
    ),
    "dtype a list": (
        entry(dtype=[]),
        f"{NORM} has dtype [], must be one of F32, F16, BF16, F8_E4M3, F8_E5M2, U8, I32, I64",
    ),
    "negative shape": (entry(shape=[-80]), f"{NORM} has shape [-80], must be a short list of whole numbers"),
    "boolean shape": (entry(shape=[True, 80]), f"{NORM} has shape [True, 80], must be a short list of whole numbers"),
    "giant shape": (
        entry(shape=[10**30]),
        f"{NORM} has shape [1000000000000000000000000000000], must be a short list of whole numbers",
    ),
    "shape of many dimensions": (
        entry(shape=[80, *[1] * 8]),
        f"{NORM} has shape [80, 1, 1, 1, 1, 1, 1, 1, ...], must be a short list of whole numbers",
    ),
    "shape a number": (entry(shape=80), f"{NORM} has shape 80, must be a short list of whole numbers"),
    "offsets backwards": (entry(data_offsets=[320, 160]), f"{NORM} has -160 bytes, BF16 [80] needs 160"),
    "negative offsets": (
        entry(data_offsets=[-160, 0]),
        f"{NORM} has data_offsets [-160, 0], must be two whole numbers",
    ),
    "three offsets": (
        entry(data_offsets=[0, 0, 160]),
        f"{NORM} has data_offsets [0, 0, 160], must be two whole numbers",
    ),
    "offsets of another size": (entry(shape=[81]), f"{NORM} has 160 bytes, BF16 [81] needs 162"),
    "overlap": (
        move_norm(-160),
        f"{NORM} overlaps the tensor before it\n  {SECOND}: has 160 bytes after the last tensor",
    ),
    "gap": (
        move_norm(160),
        f"{NORM} leaves a gap before it\n  {SECOND}: is cut short: has <*> bytes, its header needs <*>",
    ),
    "truncated": (
        lambda folder: os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1),
        f"{SECOND}: is cut short: has <*> bytes, its header needs <*>",
    ),
    "bytes after the end": (
        lambda folder: (folder / SECOND).write_bytes((folder / SECOND).read_bytes() + b"x"),
        f"{SECOND}: has 1 bytes after the last tensor",
    ),
    "tensor missing": (
        lambda folder: edit_tensors(folder / SECOND, lambda tensors: tensors.pop("norm.weight")),
        "tensor 'norm.weight' is missing",
    ),
    "tensor extra": (tensor("extra", 1), "tensor 'extra' is extra: this geometry has none of that name"),
    "tensor with a path for a name": (
        tensor("../../x", 1),
        "tensor '../../x' is extra: this geometry has none of that name",
    ),
    "tensor with control characters in its name": (
        tensor("\n\x1b[2J", 1),
        "tensor '\\n\\x1b[2J' is extra: this geometry has none of that name",
    ),
    "tensor with an HF name": (
        tensor("model.norm.weight", 80),
        "tensor 'model.norm.weight' is extra: this geometry has none of that name",
    ),
    "tensor in two files": (
        tensor("tok_embeddings.weight", 768, 80),
        "tensor 'tok_embeddings.weight' is there twice",
    ),
    "tensor transposed": (
        tensor("tok_embeddings.weight", 80, 768, file=FIRST),
        "tensor 'tok_embeddings.weight' has shape [80, 768], this geometry needs [768, 80]",
    ),
    "tensor of another dtype": (
        tensor("norm.weight", 80, dtype=torch.float32),
        "tensors of dtypes BF16, F32: a checkpoint has one; ask for a dtype to have them converted",
    ),
    "index not JSON": (content(INDEX, b"{"), f"{INDEX}: Expecting <*>"),
    "index without weight_map": (content(INDEX, b"{}"), f"{INDEX} has no weight_map"),
    "index a link out": (both(write_index, link_out(INDEX)), f"{INDEX} is a link out of the folder, to '<*>'"),
    "index a dangling link": (lambda folder: (folder / INDEX).symlink_to("nowhere"), f"{INDEX} is missing"),
    "index with a tensor elsewhere": (
        index(norm__weight=FIRST),
        f"{INDEX}: 'norm.weight' is in '{FIRST}', but stored in '{SECOND}'",
    ),
    "index with an absolute path": (
        index(norm__weight="/etc/passwd"),
        f"{INDEX}: 'norm.weight' is in '/etc/passwd', but stored in '{SECOND}'",
    ),
    "index with a list for a file": (
        index(norm__weight=[1]),
        f"{INDEX}: 'norm.weight' is in [1], but stored in '{SECOND}'",
    ),
    "index without a tensor": (
        index(norm__weight=None),
        f"{INDEX}: 'norm.weight' is in None, but stored in '{SECOND}'",
    ),
    "index with a tensor too many": (index(extra=FIRST), f"{INDEX}: 'extra' is in '{FIRST}', but stored in None"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_error_and_nothing_is_written(source: Path, tmp_path: Path, damage: str) -> None:
    act, problem = DAMAGES[damage]
    act(source)
    with pytest.raises(CheckpointError, match=whole(INCOMPLETE.format(source, "consolidated", problem))):
        convert_checkpoint(source, tmp_path / "destination")
    assert not (tmp_path / "destination").exists()


def test_an_unreadable_header_is_refused_by_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, mode: str = "r", *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", fail)
    problems = (
        f"{name} cannot be read: [Errno 13] Permission denied: '{source / name}'"
        for name in ("params.json", FIRST, SECOND, "tokenizer.model.v3")
    )
    with raises_exactly(CheckpointError, INCOMPLETE.format(source, "consolidated", "\n  ".join(problems))):
        plan_conversion(source)


def test_a_file_that_vanishes_meanwhile_is_a_problem(tmp_path: Path) -> None:
    assert read_header(tmp_path / "gone") == ([], ["gone cannot be read: No such file or directory"])


def test_a_folder_without_permission_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with raises_exactly(CheckpointError, f"{source}: no folder that can be read; give the one that holds params.json"):
        plan_conversion(source)


def test_a_source_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    with raises_exactly(
        CheckpointError,
        f"{tmp_path}/nowhere: no folder that can be read; give the one that holds params.json",
    ):
        plan_conversion(tmp_path / "nowhere")


def test_all_problems_come_in_one_error(source: Path) -> None:
    set_json(source / "params.json", dim=0)
    (source / "tokenizer.model.v3").unlink()
    edit_header(source / FIRST, lambda header: header["tok_embeddings.weight"].update(dtype="I4"))
    (source / SECOND).write_bytes(b"")
    problems = (
        "params.json: dim is 0: must be a whole number from 1 to 2147483647",
        f"{FIRST}: 'tok_embeddings.weight' has dtype 'I4', must be one of F32, F16, BF16, F8_E4M3, F8_E5M2, U8, I32, "
        "I64",
        f"{NO_FILE}: header of 0 in 0 bytes",
        "tokenizer.model.v3 is missing",
    )
    with raises_exactly(CheckpointError, INCOMPLETE.format(source, "consolidated", "\n  ".join(problems))):
        plan_conversion(source)


def test_tensors_are_checked_although_a_file_is_missing(source: Path) -> None:
    (source / SECOND).unlink()
    edit_tensors(source / FIRST, lambda tensors: tensors.update(extra=torch.zeros(1).bfloat16()))
    with pytest.raises(CheckpointError) as error:
        plan_conversion(source)
    assert str(error.value).splitlines()[1:] == [
        f"  {SECOND} is missing",
        "  tensor 'extra' is extra: this geometry has none of that name",
    ]


@pytest.mark.slow
def test_an_endless_list_of_problems_is_cut(source: Path) -> None:
    header = {f"{number}" * 1000: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]} for number in range(1200)}
    (source / SECOND).write_bytes(raw_file(header))
    with pytest.raises(CheckpointError) as error:
        plan_conversion(source)
    _, *problems, rest = str(error.value).splitlines()
    assert len(problems) == 1000
    assert max(map(len, problems)) <= 402
    assert rest.startswith("  and ")


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("7", 7), (1000, 1000), ("2TB", 2 * 10**12), ("3KB", 3000), ("9B", 9)],
)
def test_sizes_are_read_in_decimal_units(size: int | str, size_bytes: int) -> None:
    assert parse_size(size) == size_bytes


@pytest.mark.parametrize(
    "size", ["", "GB", "-5GB", "0", "5GiB", "nanGB", "infGB", "1e9", "5 G B", -1, 0, "0.4", "5GB;"]
)
def test_other_sizes_are_refused(size: int | str) -> None:
    with raises_exactly(CheckpointError, f"max_shard_size {size!r}: must be a size such as 5GB or 750MB"):
        parse_size(size)


def test_shards_are_as_large_as_allowed_and_a_larger_tensor_stands_alone(source: Path) -> None:
    plan = plan_conversion(source, max_shard_size=50_000)
    sizes = [[tensor.source.size for tensor in file.tensors] for file in plan.files]
    assert all(sum(of_file) <= 50_000 or len(of_file) == 1 for of_file in sizes)
    assert max(map(sum, sizes)) == 768 * 80 * 2
    assert sum(map(sum, sizes)) == plan.tensor_bytes


def put_names(path: Path, change: Callable[[str], str]) -> None:
    def rename(header: dict[str, Any]) -> None:
        for name in [name for name in header if name != "__metadata__"]:
            header[change(name)] = header.pop(name)

    edit_header(path, rename)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.module.{name}",
        # Parts that are compiled, sharded or recomputed one by one.
        lambda name: name.replace("layers.0.", "layers.0._orig_mod."),
        lambda name: name.replace("layers.0.", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."),
    ],
)
def test_names_of_a_wrapped_model_are_taken_without_the_wrapper(
    small_source: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "expected", to="consolidated")
    assert inspect_checkpoint(tmp_path / "hf").loads_with
    put_names(tmp_path / "hf" / "model.safetensors", change)
    # No loader would find these.
    inspection = inspect_checkpoint(tmp_path / "hf")
    assert inspection.loads_with == ()
    assert any("has the name of a wrapper in its name" in problem for problem in inspection.problems)
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated")
    assert contents(tmp_path / "back") == contents(tmp_path / "expected")


def test_a_tensor_with_and_without_a_wrapper_is_there_twice(source: Path) -> None:
    put_names(source / SECOND, lambda name: "_orig_mod." + name)
    edit_tensors(source / FIRST, lambda tensors: tensors.update({"norm.weight": torch.zeros(80, dtype=torch.bfloat16)}))
    with raises_exactly(
        CheckpointError,
        f"{source} is not a complete consolidated checkpoint; nothing was done, fix or download it again:\n"
        "  tensor 'norm.weight' is there twice",
    ):
        plan_conversion(source)


@pytest.mark.slow
def test_frequencies_of_rope_are_no_weights(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "expected", to="consolidated")
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(16) for layer in range(3)}
    edit_tensors(
        tmp_path / "hf" / "model.safetensors",
        lambda tensors: tensors.update({**frequencies, "model.rotary_emb.inv_freq": torch.ones(16)}),
    )
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated")
    assert contents(tmp_path / "back") == contents(tmp_path / "expected")
    # The vendor's layout never had any.
    edit_tensors(small_source / FIRST, lambda tensors: tensors.update(frequencies))
    with raises_exactly(
        CheckpointError,
        f"{small_source} is not a complete consolidated checkpoint; nothing was done, fix or download it again:\n"
        "  tensor 'model.layers.0.self_attn.rotary_emb.inv_freq' is extra: this geometry has none of that name\n"
        "  tensor 'model.layers.1.self_attn.rotary_emb.inv_freq' is extra: this geometry has none of that name\n"
        "  tensor 'model.layers.2.self_attn.rotary_emb.inv_freq' is extra: this geometry has none of that name\n"
        "  tensors of dtypes BF16, F32: a checkpoint has one; ask for a dtype to have them converted",
    ):
        plan_conversion(small_source)


def of_2024(settings: dict[str, Any]) -> None:
    """As transformers 4.42 has saved it."""
    del settings["head_dim"]
    settings["rope_theta"] = settings.pop("rope_parameters")["rope_theta"]
    settings |= {"torch_dtype": settings.pop("dtype"), "transformers_version": "4.42.3", "model_type": "mistral"}
    settings |= {"architectures": ["MistralForCausalLM"], "sliding_window": None}


@pytest.fixture
def square_source(tiny_geometry: Geometry, tmp_path: Path, known_tokenizer: None) -> Path:
    """A checkpoint whose heads are together as wide as the model."""
    write_consolidated(tmp_path / "square", dataclasses.replace(tiny_geometry, hidden_size=192), torch.bfloat16)
    return tmp_path / "square"


@pytest.mark.slow
def test_head_dim_is_that_of_the_query_weights_where_the_config_has_none(square_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(square_source, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "expected", to="consolidated")
    edit_json(tmp_path / "hf" / "config.json", of_2024)
    convert_checkpoint(tmp_path / "hf", tmp_path / "back", to="consolidated")
    assert contents(tmp_path / "back") == contents(tmp_path / "expected")
    assert not any("head_dim" in problem for problem in inspect_checkpoint(tmp_path / "hf").problems)


@pytest.mark.slow
def test_head_dim_is_not_guessed(small_source: Path, square_source: Path, tmp_path: Path) -> None:
    # 80 / 6 is no whole number; 192 / 6 is 32, which the rows of the query weights must be as well.
    for source, problem in ((small_source, "config.json: head_dim is missing"), (square_source, "")):
        folder = tmp_path / f"{source.name}-hf"
        convert_checkpoint(source, folder)
        edit_json(folder / "config.json", of_2024)
        if not problem:
            problem = (
                f"config.json: hidden_size / num_attention_heads is 32, but {FIRST_QUERY!r} has 384 rows, not 192: "
                "add the model's own head_dim\n  config.json: head_dim is missing"
            )
            edit_tensors(
                folder / "model.safetensors",
                lambda tensors: tensors.update({FIRST_QUERY: tensors[FIRST_QUERY].repeat(2, 1)}),
            )
        with raises_exactly(CheckpointError, INCOMPLETE.format(folder, "hf", problem)):
            plan_conversion(folder, to="consolidated")


@pytest.mark.slow
def test_special_ids_of_a_fine_tune_are_not_lost_on_the_way_back(small_source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    convert_checkpoint(small_source, folder)
    set_json(folder / "generation_config.json", eos_token_id=[2, 14], pad_token_id=2)
    with raises_exactly(
        CheckpointError,
        f"{folder}: eos_token_id is [2, 14], and the consolidated layout has no place for it: every reader takes 2; "
        "set it to 2 in config.json and generation_config.json if that is right",
    ):
        convert_checkpoint(folder, tmp_path / "out", to="consolidated")
    assert not (tmp_path / "out").exists()
    set_json(folder / "generation_config.json", eos_token_id=[2])
    convert_checkpoint(folder, tmp_path / "out", to="consolidated")


@pytest.mark.slow
def test_tokens_that_a_fine_tune_has_added_are_the_reason(small_source: Path, tmp_path: Path) -> None:
    convert_checkpoint(small_source, tmp_path / "hf")
    folder = tmp_path / "hf"

    def add_rows(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = torch.zeros(32770, 80, dtype=torch.bfloat16)

    edit_tensors(folder / "model.safetensors", add_rows)
    set_json(folder / "config.json", vocab_size=32770)
    added = [{"id": 32768, "content": "<|im_start|>"}, {"id": 32769, "content": "<|im_end|>"}]
    edit_json(folder / "tokenizer.json", lambda content: content["added_tokens"].extend(added))
    with raises_exactly(
        CheckpointError,
        f"{folder}: the weights have 32770 rows, tokenizer.model.v3 has 32768 pieces: 2 were added, ['<|im_start|>', "
        "'<|im_end|>'], and the consolidated layout has no place for added tokens; use the HF layout, or remove them "
        "and their rows first",
    ):
        convert_checkpoint(folder, tmp_path / "out", to="consolidated")
    (folder / "tokenizer.json").write_text("[]")
    with raises_exactly(
        TokenizerFileError, f"{folder / 'tokenizer.json'}: must be a JSON object, not list; download it again"
    ):
        convert_checkpoint(folder, tmp_path / "out", to="consolidated")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "base"),
    [
        (
            '{"base_model_name_or_path": "mistralai/Mistral-Large-Instruct-2407"}',
            "the base 'mistralai/Mistral-Large-Instruct-2407'",
        ),
        ('{"base_model_name_or_path": 7}', "a base that it does not name"),
        ("[]", "a base that it does not name"),
    ],
)
def test_an_adapter_is_named_as_one(source: Path, tmp_path: Path, config: str, base: str) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(config)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    problem = (
        f"{adapter}: an adapter (PEFT) of {base}, not a checkpoint; merge it with `mistral-large convert BASE "
        f"DESTINATION --adapter {adapter}`, and give that destination; chat and serve take BASE with --adapter"
    )
    for act in (plan_conversion, verify_checkpoint, lambda folder: plan_conversion(folder, to="consolidated")):
        with raises_exactly(CheckpointError, problem):
            act(adapter)
    inspection = inspect_checkpoint(adapter)
    assert (inspection.kind, len(inspection.problems), inspection.loads_with) == ("an adapter (PEFT)", 1, ())


def test_an_adapter_next_to_a_checkpoint_is_not_left_out(source: Path, tmp_path: Path) -> None:
    (source / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        convert_checkpoint(source, tmp_path / "out")
    assert str(error.value) == (
        f"{source}: holds an adapter next to the checkpoint, which would be left out; merge it with --adapter "
        f"{source}, or move adapter_config.json elsewhere"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_headers_are_read_in_time_with_their_length(tmp_path: Path, tiny_geometry: Geometry) -> None:
    def seconds(count: int) -> float:
        folder = tmp_path / str(count)
        write_consolidated(folder, tiny_geometry, torch.bfloat16)
        header = {
            f"layers.{number}.x": {"dtype": "BF16", "shape": [1], "data_offsets": [2 * number, 2 * number + 2]}
            for number in range(count)
        }
        (folder / SECOND).write_bytes(raw_file(header, b"\0" * 2 * count))
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(header, SECOND)}))
        started = time.process_time()
        with pytest.raises(CheckpointError):
            plan_conversion(folder)
        assert len(inspect_checkpoint(folder).problems) > 1000
        return time.process_time() - started

    # With the square of the length, the second would take 100 times as long.
    assert seconds(30_000) < 40 * seconds(3_000) + 1
