"""JSON that says something else than expected: a right result or an error of ours, from every reader of a folder."""

import importlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from mistral_large_cli.demo import assemble_demo_checkpoint
from mistral_large_cli.plan import read_model_geometry
from mistral_large_conversion import inspect_checkpoint, prepare_conversion
from mistral_large_conversion.checkpoint.params import ABSENT, FIXED, IGNORED, KEYS, params_from_hf_config
from mistral_large_conversion.checkpoint.safetensors_header import read_header
from mistral_large_conversion.checkpoint.source_files import LARGEST_JSON, file_problem, parse_json_object, shown
from mistral_large_conversion.errors import CheckpointError, MistralLargeError
from mistral_large_conversion.manifest import read_manifest
from mistral_large_conversion.retag import retag_checkpoint
from tests.support.errors import raises_exactly

# As text: not all of it is what json.dumps would write.
VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2.5", "1e400", "-0.0", "NaN", "-Infinity", "1e-400"),
    *("1" * 400, "-" + "9" * 400, "64.0", "[]", "[64]", "[[1], {}]", "{}", '{"a": 1}', '{"rope_type": 7}'),
    *('""', '"64"', '"default"', '"\\ud800"', '"\\u0000\\u001b[2J"', "[" * 90 + "]" * 90),
]
OTHER_KEYS = (
    *("model_type", "dtype", "torch_dtype", "architectures", "rope_parameters", "rope_scaling", "quantization_config"),
    *("rope_theta", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "transformers_version", "auto_map"),
    *("initializer_range", "attention_dropout", "quantization", "\ud800", ""),
)


@pytest.fixture(scope="module")
def consolidated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble_demo_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer of a folder, which settings do not change, is read once and not for each value."""
    for module in ("inspect", "convert"):
        read = importlib.import_module(f"mistral_large_conversion.{module}")
        monkeypatch.setattr(read, "read_folder_tokenizer", lru_cache(read.read_folder_tokenizer))


@pytest.fixture
def folders(
    consolidated: Path, demo_folder: Path, tmp_path: Path, known_tokenizer: None
) -> dict[str, tuple[Path, str]]:
    """A copy of both layouts by the name of its settings, and the layout that each is converted to."""
    return {
        "params.json": (Path(shutil.copytree(consolidated, tmp_path / "consolidated")), "hf"),
        "config.json": (Path(shutil.copytree(demo_folder, tmp_path / "hf")), "consolidated"),
    }


def read_in_every_way(folder: Path, to: Any) -> list[str]:
    """What the readers of a folder say; any other exception than ours comes through."""
    calls: list[Callable[[], object]] = [
        lambda: prepare_conversion(folder, folder.parent / "out", to=to),
        lambda: read_model_geometry(str(folder), {}),
    ]
    said = list(inspect_checkpoint(folder).problems)
    json.dumps(said)
    for call in calls:
        try:
            call()
        except MistralLargeError as error:
            said.append(str(error))
    return said


@pytest.mark.slow
@pytest.mark.usefixtures("one_reading")
@pytest.mark.parametrize("name", ["params.json", "config.json"])
def test_every_value_of_every_key_is_taken_or_refused(folders: dict[str, tuple[Path, str]], name: str) -> None:
    folder, to = folders[name]
    sound = json.loads((folder / name).read_text())
    keys = {*sound, *OTHER_KEYS, *(KEYS + tuple(FIXED) + IGNORED if name == "params.json" else ABSENT)}
    for key in sorted(keys):
        others = ", ".join(f"{json.dumps(other)}: {json.dumps(sound[other])}" for other in sound if other != key)
        for value in VALUES:
            (folder / name).write_text(f"{{{json.dumps(key)}: {value}, {others}}}")
            for line in read_in_every_way(folder, to):
                assert all(len(part) <= 1000 for part in line.splitlines()), (key, value)


def test_integers_are_real_numbers_and_booleans_are_none(folders: dict[str, tuple[Path, str]]) -> None:
    folder, _ = folders["params.json"]
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "norm_eps": 1, "rope_theta": 1000000}))
    geometry, _ = read_model_geometry(str(folder), {})
    assert (geometry.rms_norm_eps, geometry.rope_theta) == (1.0, 1e6)
    assert (type(geometry.rms_norm_eps), type(geometry.rope_theta)) == (float, float)
    for key, rule in {
        "norm_eps": "a finite number greater than 0",
        "n_layers": "a whole number from 1 to 10000",
        "rope_theta": "a finite number greater than 0",
    }.items():
        (folder / "params.json").write_text(json.dumps({**params, key: True}))
        with raises_exactly(
            CheckpointError,
            f"{folder}: no geometry of a Mistral Large: params.json: {key} is True: must be {rule}; give another "
            "folder",
        ):
            read_model_geometry(str(folder), {})


GEOMETRY = {
    "model_type": "mistral",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32768,
}


@pytest.mark.parametrize(
    ("rope", "theta", "problems"),
    [
        ({"rope_theta": 5.0}, 5.0, []),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}, "rope_theta": 5}, 5, []),
        ({"rope_parameters": {}, "rope_scaling": None, "rope_theta": 5.0}, 5.0, []),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_theta": 6.0}, 5.0, ["rope_theta is 6.0 and 5.0: must be one"]),
        # The key of 2023, which says the same.
        (
            {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
            5.0,
            ["rope_type is 'linear': only 'default' is this architecture"],
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.5}},
            5.0,
            ["rope has 'partial_rotary_factor' 0.5: the default rope has only rope_theta"],
        ),
        ({"rope_theta": 5.0, "rope_scaling": "x"}, 5.0, ["rope_scaling is 'x': must be an object"]),
    ],
)
def test_rope_is_that_of_one_place_and_nothing_of_it_is_left_out(
    rope: dict[str, Any], theta: float, problems: list[str]
) -> None:
    params, found = params_from_hf_config({**GEOMETRY, **rope})
    assert (params["rope_theta"], found) == (theta, problems)


TEXTS = {
    "with a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "not UTF-8": b'{"a": "\xff"}',
    "a lone surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
    "with a key twice": b'{"a": 1, "a": 2}',
    "nested": b"[" * 10**5,
    "a number of 5000 digits": b'{"a": %s}' % (b"1" * 5000),
    "two objects": b"{}{}",
    "a list": b"[]",
    "empty": b"",
    "zeros": b"\0" * 100,
}
SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "conversion.manifest.json"),
    *("tokenizer.json", "adapter_config.json", "model.safetensors.index.json"),
)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_is_no_object_is_one_error(folders: dict[str, tuple[Path, str]], text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_json_object(TEXTS[text])
    folder, to = folders["config.json"]
    for name in SMALL_FILES:
        sound = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(TEXTS[text])
        read_in_every_way(folder, to)
        for call in (lambda: read_manifest(folder), lambda: retag_checkpoint(folder, "mistral")):
            with suppress(MistralLargeError):
                call()
        with suppress(MistralLargeError):
            retag_checkpoint(folder, "mistral_large")
        if sound is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(sound)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def local_socket(path: Path) -> None:
    # The path of a socket is short.
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def of_10_gb(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**10)


@pytest.mark.slow
@pytest.mark.parametrize("make", [pipe, local_socket, of_10_gb, Path.mkdir])
def test_what_is_no_small_file_is_refused_before_it_is_read(
    folders: dict[str, tuple[Path, str]], make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_bytes = Path.read_bytes

    def read_small(path: Path) -> bytes:
        assert path.stat().st_size <= LARGEST_JSON, path
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_small)
    rule = f"has more than {LARGEST_JSON} bytes" if make is of_10_gb else "is not a regular file"
    for settings, (folder, to) in folders.items():
        names = {*SMALL_FILES, settings, "LICENSE", "README.md", "tokenizer.model.v3", "chat_template.jinja"}
        for name in sorted(names):
            if name == "adapter_config.json" and make is Path.mkdir:
                continue
            kept = folder / f"{name}.kept"
            if (folder / name).exists():
                (folder / name).rename(kept)
            make(folder / name)
            assert file_problem(folder, name) == f"{name} {rule}"
            read_in_every_way(folder, to)
            if make is Path.mkdir:
                (folder / name).rmdir()
            else:
                (folder / name).unlink()
            if kept.exists():
                kept.rename(folder / name)


HEADERS = {
    "metadata a text": (b'{"__metadata__": "x"}', "x has a broken header: __metadata__ must be an object of texts"),
    "metadata with a number": (b'{"__metadata__": {"a": 1}}', "x has a broken header: __metadata__ must be"),
    "metadata null": (b'{"__metadata__": null}', "x has a broken header: __metadata__ must be an object of texts"),
    "an offset a bool": (
        b'{"a": {"dtype": "BF16", "shape": [], "data_offsets": [false, 2]}}',
        "x: 'a' has data_offsets [False, 2], must be two whole numbers",
    ),
    "an offset a float": (
        b'{"a": {"dtype": "BF16", "shape": [], "data_offsets": [0.0, 2]}}',
        "x: 'a' has data_offsets [0.0, 2], must be two whole numbers",
    ),
    "an offset of 400 digits": (
        b'{"a": {"dtype": "BF16", "shape": [], "data_offsets": [0, %s]}}' % (b"1" * 400),
        "x: 'a' has data_offsets [0, 111",
    ),
    "a shape NaN": (
        b'{"a": {"dtype": "BF16", "shape": [NaN], "data_offsets": [0, 2]}}',
        "x: 'a' has shape [nan], must be",
    ),
    "a shape of a million": (
        b'{"a": {"dtype": "BF16", "shape": [%s], "data_offsets": [0, 2]}}' % b", ".join([b"1"] * 10**6),
        "x: 'a' has shape [1, 1, 1, 1, 1, 1, 1, 1, ...], must be a short list of whole numbers",
    ),
    "a tensor a number": (b'{"a": 7}', "x: 'a' has another entry than dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_of_other_types_is_one_short_problem(tmp_path: Path, header: str) -> None:
    data, problem = HEADERS[header]
    (tmp_path / "x").write_bytes(len(data).to_bytes(8, "little") + data + b"\0\0")
    tensors, problems = read_header(tmp_path / "x")
    assert (tensors, len(problems)) == ([], 1)
    assert problems[0].startswith(problem)
    assert len(problems[0]) < 300


def test_a_value_is_shown_short_and_on_one_line() -> None:
    values: tuple[Any, ...] = (
        10**4000,
        "\n\x1b" * 10**6,
        ["x"] * 10**6,
        {"a": {"b": {"c": "d" * 10**6}}},
        [[[[[[[[]]]]]]]],
        None,
    )
    for value in values:
        assert len(shown(value)) < 1500
        assert shown(value).isprintable()


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"n\xff", "ü \u202e 日本".encode(), b"n\n", b"a'b\"$(c)"])
def test_a_folder_may_have_any_name(consolidated: Path, tmp_path: Path, name: bytes) -> None:
    folder = Path(shutil.copytree(consolidated, tmp_path / os.fsdecode(name)))
    assert inspect_checkpoint(folder).problems == ()
    conversion = prepare_conversion(folder, tmp_path / os.fsdecode(b"out" + name))
    assert conversion.run()
    assert inspect_checkpoint(conversion.destination).problems == ()
    assert retag_checkpoint(conversion.destination, "mistral")
