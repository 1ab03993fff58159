"""Damage to checkpoints, of every kind and in every layout: data for the tests and for tests/campaign."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mistral_large_conversion.checkpoint.params import TO_GEOMETRY

PARAMS, TOKENIZER = "params.json", "tokenizer.model.v3"


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint's files; without an index, `index` is where one would be."""

    name: str
    settings: str  # params.json or config.json
    stem: str
    shards: int
    has_index: bool

    @property
    def is_consolidated(self) -> bool:
        return self.settings == PARAMS

    @property
    def weights(self) -> list[str]:
        if self.shards == 1:
            return [f"{self.stem}.safetensors"]
        return [f"{self.stem}-{number:05}-of-{self.shards:05}.safetensors" for number in range(1, self.shards + 1)]

    @property
    def index(self) -> str:
        return f"{self.stem}.safetensors.index.json"

    @property
    def norm(self) -> str:
        """A tensor of 64 numbers."""
        return "norm.weight" if self.is_consolidated else "model.norm.weight"

    @property
    def query(self) -> str:
        """A tensor of the last layer but those that the demo has."""
        return "layers.3.attention.wq.weight" if self.is_consolidated else "model.layers.3.self_attn.q_proj.weight"

    def write(self, sound: Path, folder: Path) -> Path:
        """Write a sound checkpoint of the same kind into a new folder in this layout and return it."""
        shutil.copytree(sound, folder)
        tensors: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            tensors |= load_file(path)
            path.unlink()
        (folder / self.index).unlink(missing_ok=True)
        names = sorted(tensors)
        weight_map: dict[str, str] = {}
        for number, file in enumerate(self.weights):
            chosen = names[number :: self.shards]
            save_file({name: tensors[name] for name in chosen}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(chosen, file)
        if self.has_index:
            (folder / self.index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        return folder


KINDS = {"consolidated": (PARAMS, "consolidated"), "HF": ("config.json", "model")}
SHAPES = {"one file": (1, False), "shards with an index": (2, True), "shards without an index": (2, False)}
LAYOUTS = {
    f"{kind}, {shape}": Layout(f"{kind}, {shape}", *names, *files)
    for kind, names in KINDS.items()
    for shape, files in SHAPES.items()
}

Act = Callable[[Path, Layout], object]
Tensors = dict[str, torch.Tensor]


def everywhere(layout: Layout) -> bool:
    return True


def sharded(layout: Layout) -> bool:
    return layout.shards > 1


def indexed(layout: Layout) -> bool:
    return layout.has_index


def consolidated(layout: Layout) -> bool:
    return layout.is_consolidated


def converted(layout: Layout) -> bool:
    return not layout.is_consolidated


@dataclass(frozen=True)
class Damage:
    """What is done to a sound folder, and what the message says; in `<…>` are names of the layout's files."""

    act: Act
    problem: str
    where: Callable[[Layout], bool] = field(default=everywhere)

    def problem_in(self, layout: Layout) -> str:
        names = {"settings": layout.settings, "index": layout.index, "norm": layout.norm, "query": layout.query}
        names |= {"last": layout.weights[-1], "stem": layout.stem}
        names |= {key: key if layout.is_consolidated else name for key, name in TO_GEOMETRY.items()}
        problem = self.problem
        for name, value in names.items():
            problem = problem.replace(f"<{name}>", value)
        return problem


Name = Callable[[Layout], str]


def named(name: str) -> Name:
    return lambda _: name


def settings(layout: Layout) -> str:
    return layout.settings


def last(layout: Layout) -> str:
    return layout.weights[-1]


def index(layout: Layout) -> str:
    return layout.index


def content(name: Name, data: bytes) -> Act:
    return lambda folder, layout: (folder / name(layout)).write_bytes(data)


def raw(header: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a safetensors file with any header, also one that the library would not write."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def setting(key: str, value: object) -> Act:
    """Another value in params.json, or for the same thing in config.json."""

    def act(folder: Path, layout: Layout) -> None:
        path = folder / layout.settings
        name = key if layout.is_consolidated else TO_GEOMETRY.get(key, key)
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return act


def first_entry(key: str, value: object) -> Act:
    """Another entry for the first tensor of a file."""

    def act(folder: Path, layout: Layout) -> None:
        header, data = header_and_data(folder / last(layout))
        header[by_offset(header)[0]][key] = value
        (folder / last(layout)).write_bytes(raw(json.dumps(header).encode(), data))

    return act


def shift(distance: int) -> Act:
    """Other places for the bytes of the last tensor of a file."""

    def act(folder: Path, layout: Layout) -> None:
        header, data = header_and_data(folder / last(layout))
        entry = header[by_offset(header)[-1]]
        entry["data_offsets"] = [offset + distance for offset in entry["data_offsets"]]
        (folder / last(layout)).write_bytes(raw(json.dumps(header).encode(), data))

    return act


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def by_offset(header: dict[str, Any]) -> list[str]:
    return sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])


def tensors(edit: Callable[[Tensors, Layout], object], *, of_all: bool = False) -> Act:
    """Edit the tensors of the last file that has the norm, or those of all files."""

    def act(folder: Path, layout: Layout) -> None:
        for file in layout.weights:
            loaded = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
            if of_all or layout.norm in loaded:
                edit(loaded, layout)
                save_file(loaded, folder / file)

    return act


def rename_norm(name: str) -> Act:
    return without_index(tensors(lambda loaded, layout: loaded.update({name: loaded.pop(layout.norm)})))


def cut_vocabulary(loaded: Tensors, layout: Layout) -> None:
    loaded.update({name: loaded[name][:32000].clone() for name in loaded if loaded[name].shape[0] == 32768})


def norm_in_every_file(loaded: Tensors, layout: Layout) -> None:
    loaded[layout.norm] = torch.zeros(64, dtype=torch.bfloat16)


def weight_map(file: object) -> Act:
    """Another place for the norm in the index."""

    def act(folder: Path, layout: Layout) -> None:
        content = json.loads((folder / layout.index).read_text())
        content["weight_map"][layout.norm] = file
        (folder / layout.index).write_text(json.dumps(content))

    return act


def twice_in_the_index(folder: Path, layout: Layout) -> None:
    text = (folder / layout.index).read_text()
    entry = f'"{layout.norm}": "{layout.weights[0]}", '
    (folder / layout.index).write_text(text.replace('"weight_map": {', f'"weight_map": {{{entry}', 1))


def remove(*names: Name) -> Act:
    def act(folder: Path, layout: Layout) -> None:
        for name in names:
            (folder / name(layout)).unlink(missing_ok=True)

    return act


def replace(name: Name, make: Callable[[Path], object]) -> Act:
    def act(folder: Path, layout: Layout) -> None:
        (folder / name(layout)).unlink(missing_ok=True)
        make(folder / name(layout))

    return act


def link_out(name: Name) -> Act:
    def act(folder: Path, layout: Layout) -> None:
        (folder.parent / "outside").mkdir(exist_ok=True)
        (folder / name(layout)).rename(folder.parent / "outside" / name(layout))
        (folder / name(layout)).symlink_to(Path("..", "outside", name(layout)))

    return act


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def all_of(*acts: Act) -> Act:
    def act(folder: Path, layout: Layout) -> None:
        for one in acts:
            one(folder, layout)

    return act


def without_index(act: Act) -> Act:
    """Where the index would be the first to speak."""
    return all_of(remove(index), act)


def remove_weights(folder: Path, layout: Layout) -> None:
    for name in (*layout.weights, layout.index):
        (folder / name).unlink(missing_ok=True)


def empty(folder: Path, layout: Layout) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def file_in_its_place(folder: Path, layout: Layout) -> None:
    shutil.rmtree(folder)
    folder.write_text("mine")


def cut(name: Name, size: int) -> Act:
    return lambda folder, layout: os.truncate(folder / name(layout), (folder / name(layout)).stat().st_size + size)


TOKENIZER_NAME, LICENCE_NAME = named(TOKENIZER), named("LICENSE")
DEEP_JSON = b'{"a": ' * 100_000
DAMAGES: dict[str, Damage] = {
    "no folder": Damage(lambda folder, _: shutil.rmtree(folder), "no such folder; give a folder"),
    "folder empty": Damage(empty, "<settings> is missing"),
    "folder a file": Damage(file_in_its_place, "is a file; give a folder"),
    # params.json or config.json
    "no settings": Damage(remove(settings), "<settings> is missing"),
    "settings a folder": Damage(replace(settings, Path.mkdir), "<settings> is not a regular file"),
    "settings a pipe": Damage(replace(settings, os.mkfifo), "<settings> is not a regular file"),
    "settings a link out": Damage(link_out(settings), "<settings> is a link out of the folder"),
    "settings a device": Damage(
        replace(settings, lambda path: path.symlink_to("/dev/zero")), "<settings> is not a regular file"
    ),
    "settings empty": Damage(content(settings, b""), "<settings>: Expecting"),
    "settings not JSON": Damage(content(settings, b"dim: 64"), "<settings>: "),
    "settings not UTF-8": Damage(content(settings, b'{"dim": "\xff"}'), "<settings>: 'utf-8'"),
    "settings nested": Damage(content(settings, DEEP_JSON), "<settings>: JSON nested too deeply"),
    "settings a list": Damage(content(settings, b"[64]"), "<settings>: must be a JSON object, not list"),
    "settings with a key twice": Damage(content(settings, b'{"dim": 64, "dim": 64}'), "<settings>: key 'dim' twice"),
    "settings of 100 MB": Damage(
        lambda folder, layout: os.truncate(folder / layout.settings, 100_000_001), "more than 100000000 bytes"
    ),
    "zero heads": Damage(setting("n_heads", 0), "<n_heads> is 0: must be a whole number from 1"),
    "zero kv heads": Damage(setting("n_kv_heads", 0), "<n_kv_heads> is 0: must be a whole number from 1"),
    "negative width": Damage(setting("dim", -64), "<dim> is -64: must be a whole number from 1"),
    "NaN norm_eps": Damage(setting("norm_eps", float("nan")), "<norm_eps> is nan: must be a finite number"),
    "infinite theta": Damage(
        setting("rope_theta", float("inf")), "rope_theta is inf: must be a finite number", consolidated
    ),
    "a billion layers": Damage(
        setting("n_layers", 10**9), "<n_layers> is 1000000000: must be a whole number from 1 to 10000"
    ),
    "ten thousand layers": Damage(setting("n_layers", 10_000), "tensor '<query>' is missing"),
    "huge width": Damage(setting("dim", 2**31 - 1), "this geometry needs [2147483647]"),
    "heads that do not divide": Damage(setting("n_kv_heads", 4), "<n_heads> 6 is not a multiple of <n_kv_heads> 4"),
    "odd head_dim": Damage(setting("head_dim", 31), "head_dim 31 is odd"),
    "head_dim a text": Damage(setting("head_dim", "32"), "head_dim is '32': must be a whole number"),
    "another head_dim": Damage(setting("head_dim", 64), "this geometry needs [384, 64]"),
    "a path for a size": Damage(
        setting("dim", "../../outside/x"), "<dim> is '../../outside/x': must be a whole number"
    ),
    "a mixture of experts": Damage(setting("moe", {"num_experts": 8}), "moe is {'num_experts': 8}", consolidated),
    "an unknown key": Damage(setting("q_lora_rank", 8), "'q_lora_rank' is unknown", consolidated),
    "a path for a key": Damage(
        setting("../../outside/x", 8), "'../../outside/x' is unknown: it may change the architecture", consolidated
    ),
    "config of another model": Damage(setting("model_type", "llama"), "model_type is 'llama'", converted),
    "a path for a model type": Damage(setting("model_type", "../x"), "model_type is '../x'", converted),
    "sliding window": Damage(setting("sliding_window", 4096), "sliding_window is 4096", converted),
    "tied embeddings": Damage(setting("tie_word_embeddings", True), "tie_word_embeddings is True", converted),
    "rope scaled": Damage(
        setting("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e6}), "rope_type is 'yarn'", converted
    ),
    "no head_dim": Damage(setting("head_dim", None), "head_dim is missing", converted),
    "quantized by others": Damage(
        setting("quantization_config", {"quant_method": "gptq"}), "its weights are quantized by gptq", converted
    ),
    # Files of weights
    "pickles only": Damage(
        all_of(remove_weights, content(named("consolidated.00.pth"), b"cos\nsystem\n(S'touch pwned'\ntR.")),
        "only 'consolidated.00.pth': pickles are not read",
        consolidated,
    ),
    "no weights": Damage(remove_weights, "no <stem>.safetensors and no <stem>-00001-of-"),
    "a shard missing": Damage(remove(last), "<last> is missing", sharded),
    "shards of two checkpoints": Damage(
        lambda folder, layout: (folder / f"{layout.stem}-00001-of-00003.safetensors").touch(),
        "files of more than one checkpoint",
    ),
    "a shard and a whole": Damage(
        lambda folder, layout: (folder / f"{layout.stem}.safetensors").touch(),
        "files of more than one checkpoint",
        sharded,
    ),
    "weights empty": Damage(content(last, b""), "<last> is not a whole safetensors file"),
    "weights a folder": Damage(replace(last, Path.mkdir), "<last> is not a regular file"),
    "weights a pipe": Damage(replace(last, os.mkfifo), "<last> is not a regular file"),
    "weights a link out": Damage(link_out(last), "<last> is a link out of the folder"),
    "weights a link to itself": Damage(replace(last, link_to_itself), "<last> cannot be read"),
    "weights truncated": Damage(cut(last, -100), "<last>: is cut short"),
    "bytes at the end": Damage(cut(last, 1), "<last>: has 1 bytes after the last tensor"),
    # Headers
    "header length giant": Damage(content(last, raw(b"{}", length=2**62)), f"header of {2**62} in 10 bytes"),
    "header length minus one": Damage(content(last, raw(b"{}", length=2**64 - 1)), "<last> is not a whole safetensors"),
    "header length zero": Damage(content(last, raw(b"")), "<last> has a broken header"),
    "header cut short": Damage(content(last, raw(b'{"a": {"dtype": "BF')), "<last> has a broken header"),
    "header not JSON": Damage(content(last, raw(b"\0" * 64)), "<last> has a broken header"),
    "header not UTF-8": Damage(content(last, raw(b'{"\xff": 1}')), "<last> has a broken header: 'utf-8'"),
    "header nested": Damage(content(last, raw(DEEP_JSON)), "<last> has a broken header: JSON nested too deeply"),
    "header a list": Damage(content(last, raw(b"[1]")), "must be a JSON object, not list"),
    "header with a tensor twice": Damage(content(last, raw(b'{"a":1,"a":2}')), "key 'a' twice in one object"),
    "tensors overlapping": Damage(shift(-2), "overlaps the tensor before it"),
    "a gap between tensors": Damage(shift(2), "leaves a gap before it"),
    "offsets negative": Damage(first_entry("data_offsets", [-128, 0]), "must be two whole numbers"),
    "offsets infinite": Damage(first_entry("data_offsets", [0, float("inf")]), "must be two whole numbers"),
    "offsets backwards": Damage(first_entry("data_offsets", [128, 0]), "has -128 bytes"),
    "three offsets": Damage(first_entry("data_offsets", [0, 64, 128]), "must be two whole numbers"),
    "shape negative": Damage(first_entry("shape", [-64]), "must be a short list of whole numbers"),
    "shape giant": Damage(first_entry("shape", [2**62, 2**62]), "needs"),
    "shape of twenty dimensions": Damage(first_entry("shape", [1] * 20), "must be a short list"),
    "dtype unknown": Damage(first_entry("dtype", "BOOL"), "has dtype 'BOOL'"),
    "dtype not a text": Damage(first_entry("dtype", {"a": 1}), "has dtype {'a': 1}"),
    # Tensors
    "a tensor of another dtype": Damage(
        tensors(lambda loaded, layout: loaded.update({layout.norm: loaded[layout.norm].float()})),
        "tensors of dtypes BF16, F32",
    ),
    "a tensor missing": Damage(
        without_index(tensors(lambda loaded, layout: loaded.pop(layout.norm))), "tensor '<norm>' is missing"
    ),
    "a tensor extra": Damage(
        without_index(tensors(lambda loaded, _: loaded.update(extra=torch.zeros(1, dtype=torch.bfloat16)))),
        "tensor 'extra' is extra",
    ),
    "a tensor of a LoRA": Damage(rename_norm("norm.lora_A.weight"), "tensor 'norm.lora_A.weight' is extra"),
    "a tensor in two shards": Damage(
        without_index(tensors(norm_in_every_file, of_all=True)), "tensor '<norm>' is there twice", sharded
    ),
    "a tensor transposed": Damage(
        tensors(lambda loaded, layout: loaded.update({layout.norm: loaded[layout.norm][None].clone()})),
        "tensor '<norm>' has shape [1, 64], this geometry needs [64]",
    ),
    "a tensor too short": Damage(
        tensors(lambda loaded, layout: loaded.update({layout.norm: loaded[layout.norm][:63].clone()})),
        "tensor '<norm>' has shape [63], this geometry needs [64]",
    ),
    "a tensor named as a path": Damage(rename_norm("../../outside/x"), "tensor '../../outside/x' is extra"),
    "a tensor named as an absolute path": Damage(rename_norm("/outside/x"), "tensor '/outside/x' is extra"),
    "a tensor named to clear the screen": Damage(rename_norm("\x1b[2J\n"), "tensor '\\x1b[2J\\n' is extra"),
    # The index
    "index empty": Damage(content(index, b""), "<index>: Expecting", indexed),
    "index not JSON": Damage(content(index, b"{"), "<index>: ", indexed),
    "index nested": Damage(content(index, DEEP_JSON), "<index>: JSON nested too deeply", indexed),
    "index without a map": Damage(content(index, b'{"weight_map": []}'), "<index> has no weight_map", indexed),
    "index with a tensor twice": Damage(twice_in_the_index, "<index>: key '<norm>' twice", indexed),
    "index with an absolute path": Damage(
        weight_map("/etc/passwd"), "'<norm>' is in '/etc/passwd', but stored in", indexed
    ),
    "index with a path out": Damage(
        weight_map("../outside/x"), "'<norm>' is in '../outside/x', but stored in", indexed
    ),
    "index with another shard": Damage(
        weight_map("consolidated-00003-of-00002.safetensors"), "'<norm>' is in", indexed
    ),
    "index with a number for a file": Damage(weight_map(7), "'<norm>' is in 7", indexed),
    "index a pipe": Damage(replace(index, os.mkfifo), "<index> is not a regular file", indexed),
    "index a link out": Damage(link_out(index), "<index> is a link out of the folder", indexed),
    # The tokenizer and the licence
    "no tokenizer": Damage(remove(TOKENIZER_NAME), "tokenizer.model.v3 is missing", consolidated),
    "tokenizer empty": Damage(content(TOKENIZER_NAME, b""), "tokenizer.model.v3: not a SentencePiece model"),
    "tokenizer foreign": Damage(
        content(TOKENIZER_NAME, b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"), "tokenizer.model.v3: "
    ),
    "tokenizer truncated": Damage(cut(TOKENIZER_NAME, -1000), "tokenizer.model.v3: "),
    "tokenizer a folder": Damage(replace(TOKENIZER_NAME, Path.mkdir), "tokenizer.model.v3 is not a regular file"),
    "tokenizer a link out": Damage(link_out(TOKENIZER_NAME), "tokenizer.model.v3 is a link out of the folder"),
    "vocabulary of another size": Damage(
        all_of(setting("vocab_size", 32000), tensors(cut_vocabulary, of_all=True)),
        ", the weights have 32000 rows",
    ),
    "licence a link out": Damage(link_out(LICENCE_NAME), "LICENSE is a link out of the folder"),
    "licence a pipe": Damage(replace(LICENCE_NAME, os.mkfifo), "LICENSE is not a regular file"),
}
