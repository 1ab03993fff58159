"""Damage of every kind, as the command line meets it: one message, exit code 2, nothing written, nothing touched."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_large_cli import main
from mistral_large_cli.demo import assemble_demo_checkpoint

FIRST, SECOND = (f"consolidated-{number:05}-of-00002.safetensors" for number in (1, 2))
INDEX, PARAMS, TOKENIZER = "consolidated.safetensors.index.json", "params.json", "tokenizer.model.v3"

Damage = Callable[[Path], object]


def content(name: str, data: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(data)


def raw(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, also one that the library would not write."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def setting(name: str, key: str, value: object) -> Damage:
    def act(folder: Path) -> None:
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, key: value}))

    return act


def params(key: str, value: object) -> Damage:
    return setting(PARAMS, key, value)


def config(key: str, value: object) -> Damage:
    return setting("config.json", key, value)


def entry(key: str, value: object, *, file: str = SECOND) -> Damage:
    """Another entry for the first tensor of a file."""

    def act(folder: Path) -> None:
        data = (folder / file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        first = min((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        header[first][key] = value
        (folder / file).write_bytes(raw(json.dumps(header).encode(), data[8 + length :]))

    return act


def shift(distance: int) -> Damage:
    """Other places for the bytes of the last tensor of a file."""

    def act(folder: Path) -> None:
        data = (folder / SECOND).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        header[last]["data_offsets"] = [offset + distance for offset in header[last]["data_offsets"]]
        (folder / SECOND).write_bytes(raw(json.dumps(header).encode(), data[8 + length :]))

    return act


def tensors(edit: Callable[[dict[str, torch.Tensor]], object], *, file: str = SECOND) -> Damage:
    def act(folder: Path) -> None:
        loaded = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        edit(loaded)
        save_file(loaded, folder / file)

    return act


def index(name: str, file: object) -> Damage:
    def act(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(content))

    return act


def remove(*names: str) -> Damage:
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def replace(name: str, make: Callable[[Path], object]) -> Damage:
    def act(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return act


def link_out(name: str) -> Damage:
    def act(folder: Path) -> None:
        (folder / name).rename(folder.parent / "outside" / name)
        (folder / name).symlink_to(Path("..", "outside", name))

    return act


def both(*damages: Damage) -> Damage:
    def act(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return act


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def file_in_its_place(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("mine")


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size + size)


def rename_tensor(old: str, new: str, *, file: str = SECOND) -> Damage:
    return tensors(lambda loaded: loaded.update({new: loaded.pop(old)}), file=file)


NORM = "norm.weight"
BILLION_LAUGHS = b'{"a": ' * 100_000

# Each: what is done to a sound folder, and what the message says.
CONSOLIDATED: dict[str, tuple[Damage, str]] = {
    "no folder": (shutil.rmtree, "no such folder; give a folder"),
    "folder empty": (empty, "params.json is missing"),
    "folder a file": (file_in_its_place, "is a file; give a folder"),
    "no params": (remove(PARAMS), "params.json is missing"),
    "params a folder": (replace(PARAMS, Path.mkdir), "params.json is not a regular file"),
    "params a pipe": (replace(PARAMS, os.mkfifo), "params.json is not a regular file"),
    "params a link out": (link_out(PARAMS), "params.json is a link out of the folder"),
    "params a device": (
        replace(PARAMS, lambda path: path.symlink_to("/dev/zero")),
        "params.json is not a regular file",
    ),
    "params not JSON": (content(PARAMS, b"dim: 64"), "params.json: "),
    "params not UTF-8": (content(PARAMS, b'{"dim": "\xff"}'), "params.json: 'utf-8'"),
    "params nested": (content(PARAMS, BILLION_LAUGHS), "params.json: JSON nested too deeply"),
    "params with a key twice": (content(PARAMS, b'{"dim": 64, "dim": 64}'), "params.json: key 'dim' twice"),
    "params of 100 MB": (lambda folder: os.truncate(folder / PARAMS, 100_000_001), "more than 100000000 bytes"),
    "zero heads": (params("n_heads", 0), "n_heads is 0: must be a whole number from 1"),
    "zero kv heads": (params("n_kv_heads", 0), "n_kv_heads is 0: must be a whole number from 1"),
    "negative width": (params("dim", -64), "dim is -64: must be a whole number from 1"),
    "NaN norm_eps": (params("norm_eps", float("nan")), "norm_eps is nan: must be a finite number"),
    "infinite theta": (params("rope_theta", float("inf")), "rope_theta is inf: must be a finite number"),
    "a billion layers": (params("n_layers", 10**9), "n_layers is 1000000000: must be a whole number from 1 to 10000"),
    "ten thousand layers": (params("n_layers", 10_000), "tensor 'layers.3.attention.wq.weight' is missing"),
    "huge width": (params("dim", 2**31 - 1), "this geometry needs [2147483647]"),
    "heads that do not divide": (params("n_kv_heads", 4), "n_heads 6 is not a multiple of n_kv_heads 4"),
    "odd head_dim": (params("head_dim", 31), "head_dim 31 is odd"),
    "head_dim a text": (params("head_dim", "32"), "head_dim is '32': must be a whole number"),
    "a mixture of experts": (params("moe", {"num_experts": 8}), "moe is {'num_experts': 8}"),
    "an unknown key": (params("q_lora_rank", 8), "'q_lora_rank' is unknown"),
    "another head_dim": (params("head_dim", 64), "this geometry needs [384, 64]"),
    "pickles only": (
        both(remove(FIRST, SECOND, INDEX), content("consolidated.00.pth", b"cos\nsystem\n(S'touch pwned'\ntR.")),
        "only 'consolidated.00.pth': pickles are not read",
    ),
    "no weights": (remove(FIRST, SECOND), "no consolidated.safetensors and no consolidated-00001-of-"),
    "a shard missing": (remove(SECOND), f"{SECOND} is missing"),
    "shards of two checkpoints": (
        content("consolidated-00001-of-00003.safetensors", b""),
        "files of more than one checkpoint",
    ),
    "a shard and a whole": (content("consolidated.safetensors", b""), "files of more than one checkpoint"),
    "a shard empty": (content(SECOND, b""), f"{SECOND} is not a whole safetensors file"),
    "a shard a folder": (replace(SECOND, Path.mkdir), f"{SECOND} is not a regular file"),
    "a shard a pipe": (replace(SECOND, os.mkfifo), f"{SECOND} is not a regular file"),
    "a shard a link out": (link_out(SECOND), f"{SECOND} is a link out of the folder"),
    "a shard a link to itself": (replace(SECOND, lambda path: path.symlink_to(SECOND)), f"{SECOND} cannot be read"),
    "header length giant": (content(SECOND, raw(b"{}", length=2**62)), f"header of {2**62} in 10 bytes"),
    "header length minus one": (content(SECOND, raw(b"{}", length=2**64 - 1)), f"{SECOND} is not a whole safetensors"),
    "header length zero": (content(SECOND, raw(b"")), f"{SECOND} has a broken header"),
    "header not JSON": (content(SECOND, raw(b"\0" * 64)), f"{SECOND} has a broken header"),
    "header nested": (content(SECOND, raw(BILLION_LAUGHS)), f"{SECOND} has a broken header: JSON nested too deeply"),
    "header a list": (content(SECOND, raw(b"[1]")), "must be a JSON object, not list"),
    "header with a tensor twice": (content(SECOND, raw(b'{"a":1,"a":2}')), "key 'a' twice in one object"),
    "a shard truncated": (cut(SECOND, -100), f"{SECOND}: is cut short"),
    "bytes at the end": (cut(SECOND, 1), f"{SECOND}: has 1 bytes after the last tensor"),
    "tensors overlapping": (shift(-2), "overlaps the tensor before it"),
    "a gap between tensors": (shift(2), "leaves a gap before it"),
    "offsets negative": (entry("data_offsets", [-128, 0]), "must be two whole numbers"),
    "offsets infinite": (entry("data_offsets", [0, float("inf")]), "must be two whole numbers"),
    "shape negative": (entry("shape", [-64]), "must be a short list of whole numbers"),
    "shape giant": (entry("shape", [2**62, 2**62]), "needs"),
    "dtype unknown": (entry("dtype", "BOOL"), "has dtype 'BOOL'"),
    "dtype not a text": (entry("dtype", {"a": 1}), "has dtype {'a': 1}"),
    "a tensor of another dtype": (
        tensors(lambda loaded: loaded.update({NORM: loaded[NORM].float()})),
        "tensors of dtypes BF16, F32",
    ),
    "a tensor missing": (both(remove(INDEX), tensors(lambda loaded: loaded.pop(NORM))), f"tensor {NORM!r} is missing"),
    "a tensor extra": (
        both(remove(INDEX), tensors(lambda loaded: loaded.update(extra=torch.zeros(1, dtype=torch.bfloat16)))),
        "tensor 'extra' is extra",
    ),
    "a tensor in two shards": (
        both(
            remove(INDEX),
            lambda folder: tensors(
                lambda loaded: loaded.update({NORM: torch.zeros(64, dtype=torch.bfloat16)}), file=FIRST
            )(folder),
        ),
        f"tensor {NORM!r} is there twice",
    ),
    "a tensor transposed": (
        tensors(lambda loaded: loaded.update({NORM: loaded[NORM][None].clone()})),
        f"tensor {NORM!r} has shape [1, 64], this geometry needs [64]",
    ),
    "a tensor named as a path": (
        both(remove(INDEX), rename_tensor(NORM, "../../outside/x")),
        "tensor '../../outside/x' is extra",
    ),
    "a tensor named as an absolute path": (
        both(remove(INDEX), rename_tensor(NORM, "/outside/x")),
        "tensor '/outside/x' is extra",
    ),
    "a tensor named to clear the screen": (
        both(remove(INDEX), rename_tensor(NORM, "\x1b[2J\n")),
        "tensor '\\x1b[2J\\n' is extra",
    ),
    "index not JSON": (content(INDEX, b"{"), f"{INDEX}: "),
    "index without a map": (content(INDEX, b'{"weight_map": []}'), f"{INDEX} has no weight_map"),
    "index with an absolute path": (index(NORM, "/etc/passwd"), f"{NORM!r} is in '/etc/passwd', but stored in"),
    "index with a path out": (index(NORM, "../outside/x"), f"{NORM!r} is in '../outside/x', but stored in"),
    "index with another shard": (index(NORM, "consolidated-00003-of-00002.safetensors"), f"{NORM!r} is in"),
    "index a link out": (link_out(INDEX), f"{INDEX} is a link out of the folder"),
    "no tokenizer": (remove(TOKENIZER), "tokenizer.model.v3 is missing"),
    "tokenizer empty": (content(TOKENIZER, b""), "tokenizer.model.v3: not a SentencePiece model"),
    "tokenizer foreign": (content(TOKENIZER, b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"), "tokenizer.model.v3: "),
    "tokenizer truncated": (cut(TOKENIZER, -1000), "tokenizer.model.v3: "),
    "tokenizer a link out": (link_out(TOKENIZER), "tokenizer.model.v3 is a link out of the folder"),
    "vocabulary of another size": (
        both(
            params("vocab_size", 32000),
            *(
                tensors(
                    lambda loaded: loaded.update(
                        {name: loaded[name][:32000].clone() for name in loaded if loaded[name].shape[0] == 32768}
                    ),
                    file=file,
                )
                for file in (FIRST, SECOND)
            ),
        ),
        "has 32768 pieces, the weights have 32000 rows",
    ),
    "licence a link out": (link_out("LICENSE"), "LICENSE is a link out of the folder"),
    "licence a pipe": (replace("LICENSE", os.mkfifo), "LICENSE is not a regular file"),
}

HF: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "config.json is missing"),
    "config not JSON": (content("config.json", b"{"), "config.json: Expecting"),
    "config of another model": (config("model_type", "llama"), "model_type is 'llama'"),
    "sliding window": (config("sliding_window", 4096), "sliding_window is 4096"),
    "tied embeddings": (config("tie_word_embeddings", True), "tie_word_embeddings is True"),
    "rope scaled": (config("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}), "rope_type is 'yarn'"),
    "no head_dim": (config("head_dim", None), "head_dim is None"),
    "NaN eps": (config("rms_norm_eps", float("nan")), "norm_eps is nan"),
    "quantized": (config("quantization_config", {"quant_method": "fp8"}), "quantization_config is"),
    "config a link out": (link_out("config.json"), "config.json is a link out of the folder"),
    "no weights": (remove("model.safetensors"), "no model.safetensors and no model-00001-of-"),
    "weights truncated": (cut("model.safetensors", -1), "model.safetensors: is cut short"),
    "weights a pipe": (replace("model.safetensors", os.mkfifo), "model.safetensors is not a regular file"),
    "header giant": (content("model.safetensors", raw(b"{}", length=2**63)), "is not a whole safetensors file"),
    "tensor missing": (
        tensors(lambda loaded: loaded.pop("lm_head.weight"), file="model.safetensors"),
        "tensor 'lm_head.weight' is missing",
    ),
    "tensor of a LoRA": (
        rename_tensor("lm_head.weight", "lm_head.lora_A.weight", file="model.safetensors"),
        "tensor 'lm_head.lora_A.weight' is extra",
    ),
    "no tokenizer model": (remove(TOKENIZER), "tokenizer.model.v3 is missing"),
}


@pytest.fixture(scope="module")
def sound_consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a neighbour that must stay as it is."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("mine")
    monkeypatch.chdir(tmp_path)
    # A name without a folder could be a repository's id; no test may ask the hub.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def everything_in(folder: Path) -> dict[str, Any]:
    """Every name under a folder, with what tells one content from another without opening pipes."""

    def entries(path: Path) -> Iterator[tuple[str, Any]]:
        for name in sorted(os.listdir(path)):
            child = path / name
            state = child.lstat()
            if child.is_symlink():
                yield str(child), ("link", os.readlink(child))
            elif child.is_dir():
                yield str(child), "folder"
                yield from entries(child)
            elif child.is_file() and state.st_size < 10**7:
                yield str(child), (child.read_bytes(), state.st_mtime_ns)
            else:
                yield str(child), (state.st_mode, state.st_size, state.st_mtime_ns)

    return dict(entries(folder))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mistral-large", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return int(exit_.value.code or 0)


def refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finding: str, *arguments: object
) -> None:
    """Run the command and hold it to its promise for a source that it cannot take."""
    before = everything_in(place)
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert finding in printed.err
    assert printed.err.count("mistral-large: ") == 1
    assert printed.err.startswith("mistral-large: ")
    assert "Traceback" not in printed.err
    assert "\x1b" not in printed.err
    assert printed.out == ""
    assert everything_in(place) == before


@pytest.mark.parametrize("damage", CONSOLIDATED)
def test_a_damaged_source_is_refused(
    sound_consolidated: Path,
    place: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(sound_consolidated, place / "source"))
    act, finding = CONSOLIDATED[damage]
    act(source)
    refused(place, monkeypatch, capsys, finding, "convert", source, place / "hf")


@pytest.mark.parametrize("damage", HF)
def test_a_damaged_source_of_the_way_back_is_refused(
    demo_folder: Path, place: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Path(shutil.copytree(demo_folder, place / "source"))
    act, finding = HF[damage]
    act(source)
    refused(place, monkeypatch, capsys, finding, "convert", source, place / "back", "--to", "consolidated")
    refused(
        place, monkeypatch, capsys, "source", "convert", source, place / "back", "--to", "consolidated", "--dry-run"
    )


def mkdir_with(name: str) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        path.mkdir()
        (path / name).write_text("mine")

    return make


# Where the destination is, relative to the place, what is there, and what the message says.
DESTINATIONS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "the source itself": ("source", lambda path: None, "choose a folder elsewhere"),
    "in the source": ("source/hf", lambda path: None, "choose a folder elsewhere"),
    "in the source, by detours": ("outside/../source/a/../hf", lambda path: None, "choose a folder elsewhere"),
    "around the source": (".", lambda path: None, "choose a folder elsewhere"),
    "a link to the source": ("link", lambda path: path.symlink_to("source"), "choose a folder elsewhere"),
    "a file": ("hf", lambda path: path.write_text("mine"), "hf"),
    "under a file": ("hf/deep", lambda path: path.parent.write_text("mine"), "hf"),
    "a pipe": ("hf", os.mkfifo, "hf"),
    "a link to nowhere": ("hf", lambda path: path.symlink_to("missing/deep"), "hf"),
    "a folder with a file": ("hf", mkdir_with("notes.txt"), "hf"),
    "a folder with weights": ("hf", mkdir_with("model.safetensors"), "hf"),
    "a folder with a hidden file": ("hf", mkdir_with(".git"), "hf"),
    "a foreign marker": ("hf", mkdir_with("conversion.unfinished.txt"), "hf"),
}


@pytest.mark.parametrize("case", DESTINATIONS)
def test_a_destination_that_must_not_be_written_is_refused(
    sound_consolidated: Path,
    place: Path,
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(sound_consolidated, place / "source")
    name, make, finding = DESTINATIONS[case]
    make(place / name)
    refused_or_usage(place, monkeypatch, capsys, finding, "convert", place / "source", place / name)


def refused_or_usage(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finding: str, *arguments: object
) -> None:
    """As `refused`, where the command line itself may have found that a path is a file."""
    before = everything_in(place)
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert finding in error
    assert "Traceback" not in error
    assert everything_in(place) == before


@pytest.mark.parametrize("damage", ["pickles only", "a shard a pipe", "tokenizer foreign"])
def test_a_process_of_its_own_says_the_same(sound_consolidated: Path, place: Path, damage: str) -> None:
    source = Path(shutil.copytree(sound_consolidated, place / "source"))
    act, finding = CONSOLIDATED[damage]
    act(source)
    before = everything_in(place)
    done = subprocess.run(
        [sys.executable, "-m", "mistral_large_cli", "convert", "source", "hf"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert finding in done.stderr
    assert done.stderr.startswith("mistral-large: ")
    assert "Traceback" not in done.stderr
    assert everything_in(place) == before


@pytest.mark.parametrize("damage", [name for name in CONSOLIDATED if name not in ("no folder", "folder a file")])
def test_inspect_finds_it_and_does_not_fail(
    sound_consolidated: Path,
    place: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(sound_consolidated, place / "source"))
    CONSOLIDATED[damage][0](source)
    before = everything_in(place)
    assert run(monkeypatch, "inspect", source, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    # What a tokenizer does is not in any header.
    assert bool(printed["findings"]) == (
        not damage.startswith(("tokenizer empty", "tokenizer f", "tokenizer tr", "voc"))
    )
    assert everything_in(place) == before


VERIFIED = (
    *("no folder", "folder empty", "folder a file", "params a pipe", "params nested", "zero heads", "NaN norm_eps"),
    *("pickles only", "a shard missing", "a shard a pipe", "a shard a link out", "header length giant"),
    *("a shard truncated", "tensors overlapping", "a tensor missing", "a tensor named as a path"),
    *("index with an absolute path", "tokenizer foreign", "licence a pipe"),
)


@pytest.mark.parametrize("damage", VERIFIED)
def test_verify_neither_passes_it_nor_fails(
    sound_consolidated: Path,
    demo_folder: Path,
    place: Path,
    damage: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = Path(shutil.copytree(sound_consolidated, place / "source"))
    CONSOLIDATED[damage][0](source)
    before = everything_in(place)
    # Bad as a source, of which nothing can be proven, and bad as a result.
    for arguments in [(demo_folder, source), (source, demo_folder)]:
        assert run(monkeypatch, "verify", *arguments) in (1, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert everything_in(place) == before
