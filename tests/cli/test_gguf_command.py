"""`mistral-large convert --to gguf` around tools that are not llama.cpp's: what is refused, what fails, what is left.

What the real tools write is tested in tests/engines/test_gguf.py.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mistral_large_conversion.gguf import REPOSITORY, prepare_gguf
from tests.support import folders
from tests.support.command import run

# Writes the names of the files that it is given as its output, and where the weights are.
CONVERTER = """\
import json, os, sys
folder, outfile = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
print("reading", folder)
seen = {
    "arguments": sys.argv[1:],
    "links": sorted(name for name in os.listdir(folder) if os.path.islink(os.path.join(folder, name))),
    "files": sorted(os.listdir(folder)),
    "settings": json.load(open(os.path.join(folder, "tokenizer_config.json"))),
}
json.dump(seen, open(outfile, "w"))
"""
QUANTIZER = """\
#!/bin/sh
test ! -e mistral || exit 9
{ cat "$1"; echo; echo "$3"; } > "$2"
"""


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder that looks like llama.cpp's, built."""
    folder = tmp_path / "llama.cpp"
    (folder / "build" / "bin").mkdir(parents=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    write_quantizer(folder, QUANTIZER)
    return folder


def write_quantizer(folder: Path, text: str) -> None:
    path = folder / "build" / "bin" / "llama-quantize"
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder to write into; braces mean something to the converter."""
    (tmp_path / "out {ftype}").mkdir()
    return tmp_path / "out {ftype}"


def convert(*arguments: object) -> int:
    return run("convert", *arguments, "--to", "gguf")


@pytest.mark.slow
def test_a_file_comes_through_both_tools_and_nothing_else_stays(
    llama_cpp: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders.vendor(tmp_path / "the model")
    command = (source, out / "m.gguf", "--llama-cpp", llama_cpp, "--gguf-type", "q4_k_m")
    assert convert(*command, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "by    convert_hf_to_gguf.py --outtype bf16, then llama-quantize Q4_K_M\n" in printed
    assert "nothing was written" in printed
    assert not [*out.iterdir()]
    assert convert(*command) == 0
    printed = capsys.readouterr().out
    assert "llama-server -m " in printed
    assert [path.name for path in out.iterdir()] == ["m.gguf"]
    seen, quantized = (out / "m.gguf").read_text().splitlines()
    found = json.loads(seen)
    assert quantized == "Q4_K_M"
    assert found["arguments"] == [
        *("mistral", "--outfile", "converted.gguf", "--outtype", "bf16", "--model-name", "the model")
    ]
    assert found["settings"]["add_prefix_space"] is False
    assert {"tokenizer.model", "tokenizer.model.v3", "config.json", "model.safetensors"} <= {*found["files"]}
    assert not found["links"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--dtype", "fp16"]])
def test_weights_of_the_hf_layout_are_linked_unless_they_change(
    llama_cpp: Path, out: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Its files are links themselves, to blobs without names.
    source = folders.into_hub_cache(folders.fine_tune(tmp_path / "source", added=("<|im_start|>",)), tmp_path / "hub")
    assert convert(source, out / "m.gguf", "--llama-cpp", llama_cpp, "--json", *options) == 0
    report, found = json.loads(capsys.readouterr().out), json.loads((out / "m.gguf").read_text())
    assert report["tools"] == [f"convert_hf_to_gguf.py --outtype {'f16' if options else 'bf16'}"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert found["links"] == ([] if options else weights)
    assert found["settings"]["added_tokens_decoder"] == {"32768": {"content": "<|im_start|>", "special": True}}
    # The folder of stock Mistral takes room only where it is written.
    assert (report["needed_bytes"] > 1.9 * report["tensor_bytes"]) == bool(options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gguf-type", "Q4_X"], "GGUF type 'Q4_X': must be one of BF16, F16, F32, Q8_0, Q2_K, Q3_K_S, Q3_K_M"),
        (["--jobs", 2], "--jobs: has no effect with --to gguf"),
        (["--as", "mistral"], "--as: has no effect with --to gguf"),
        (["--quantize", "int4"], "--quantize: has no effect with --to gguf"),
        (["--calibration", "default"], "--calibration: has no effect with --to gguf"),
        (["--samples", 2], "--samples: has no effect with --to gguf"),
        (["--length", 2], "--length: has no effect with --to gguf"),
        (["--device", "cpu"], "--device: has no effect with --to gguf"),
        (["--base", "owner/name"], "--base: has no effect with --to gguf"),
        (["--max-shard-size", "1GB"], "--max-shard-size: has no effect with --to gguf"),
        (["--revision", "main"], "--revision: has no effect: "),
        (["--llama-quantize", "llama-quantize"], "llama-quantize llama-quantize: has no effect: convert_hf_to_gguf.py"),
        (
            ["--gguf-type", "Q6_K", "--llama-quantize", "nowhere"],
            "llama-quantize: no program at nowhere; build it with",
        ),
    ],
)
def test_an_option_without_effect_or_meaning_is_one_line(
    options: list[object], message: str, llama_cpp: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders.vendor(tmp_path / "source")
    assert convert(source, out / "m.gguf", "--llama-cpp", llama_cpp, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mistral-large: {message}")
    assert error.count("\n") == 1
    assert not [*out.iterdir()]


@pytest.mark.parametrize("option", ["--gguf-type", "--llama-cpp", "--llama-quantize"])
def test_options_of_gguf_are_refused_for_other_layouts(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", tmp_path, tmp_path / "hf", option, "x") == 2
    assert capsys.readouterr().err == (
        f"mistral-large: {option} x: has no effect without --to gguf, which it is for; leave it out\n"
    )


@pytest.mark.slow
def test_without_llama_cpp_the_error_says_where_it_is_found(
    llama_cpp: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders.vendor(tmp_path / "source")
    assert convert(source, out / "m.gguf") == 2
    assert capsys.readouterr().err == (
        "mistral-large: --to gguf: needs llama.cpp, whose convert_hf_to_gguf.py writes the file; get it with "
        f"`git clone {REPOSITORY}` and add --llama-cpp llama.cpp\n"
    )
    assert convert(source, out / "m.gguf", "--llama-cpp", out) == 2
    assert "no convert_hf_to_gguf.py in it; get llama.cpp with `git clone" in capsys.readouterr().err
    # Where it is not built, the PATH counts.
    built = llama_cpp / "build" / "bin"
    command = (source, out / "m.gguf", "--llama-cpp", llama_cpp, "--gguf-type", "Q6_K")
    built.rename(llama_cpp / "elsewhere")
    assert convert(*command) == 2
    assert capsys.readouterr().err == (
        f"mistral-large: llama-quantize: neither at {built / 'llama-quantize'} nor on the PATH; build it with `cmake "
        "-B build "
        f"&& cmake --build build --target llama-quantize` in {llama_cpp}, or say where it is\n"
    )
    assert convert(*command, "--dry-run", "--llama-quantize", llama_cpp / "elsewhere") == 0
    monkeypatch.setenv("PATH", str(llama_cpp / "elsewhere"), prepend=os.pathsep)
    assert convert(*command, "--dry-run") == 0
    assert not [*out.iterdir()]


@pytest.mark.slow
def test_what_a_tool_says_when_it_fails_is_shown_and_nothing_stays(
    llama_cpp: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders.vendor(tmp_path / "source")
    command = (source, out / "m.gguf", "--llama-cpp", llama_cpp, "--gguf-type", "Q6_K")
    write_quantizer(llama_cpp, "#!/bin/sh\necho half > $2\necho a row is odd >&2\nexit 3\n")
    assert convert(*command) == 2
    error = capsys.readouterr().err
    assert "not written: llama-quantize ended with exit code 3; when what it printed last is fixed" in error
    assert error.endswith(":\na row is odd\n")
    (llama_cpp / "convert_hf_to_gguf.py").write_text("import nothing_such")
    assert convert(*command) == 2
    error = capsys.readouterr().err
    assert "convert_hf_to_gguf.py ended with exit code 1" in error
    assert error.endswith("ModuleNotFoundError: No module named 'nothing_such'\n")
    # A tool that says all is well and has written nothing.
    (llama_cpp / "convert_hf_to_gguf.py").write_text("")
    write_quantizer(llama_cpp, "#!/bin/sh\n")
    assert convert(*command) == 2
    assert "m.gguf: not written: " in capsys.readouterr().err
    assert not [*out.iterdir()]


@pytest.mark.slow
def test_what_is_there_stays(llama_cpp: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folders.vendor(tmp_path / "source")
    (out / "m.gguf").write_text("mine")
    (out / "link.gguf").symlink_to("nowhere")
    for name in ("m.gguf", "link.gguf", "."):
        assert convert(source, out / name, "--llama-cpp", llama_cpp) == 2
        assert capsys.readouterr().err == (
            f"mistral-large: {out / name}: is there already; choose a new name, or remove it first\n"
        )
    assert convert(source, source / "m.gguf", "--llama-cpp", llama_cpp) == 2
    assert "is in the source" in capsys.readouterr().err
    # One that comes while the tools run stays, too.
    (llama_cpp / "convert_hf_to_gguf.py").write_text(
        f"{CONVERTER}\nopen({str(out / 'new.gguf')!r}, 'w').write('other')"
    )
    assert convert(source, out / "new.gguf", "--llama-cpp", llama_cpp) == 2
    assert "is there already" in capsys.readouterr().err
    assert sorted(path.name for path in out.iterdir()) == ["link.gguf", "m.gguf", "new.gguf"]
    assert ((out / "m.gguf").read_text(), (out / "new.gguf").read_text()) == ("mine", "other")


@pytest.mark.slow
def test_a_disk_without_room_is_refused(
    llama_cpp: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders.vendor(tmp_path / "source")
    needed = prepare_gguf(source, out / "m.gguf", name="m", llama_cpp=llama_cpp, gguf_type="Q6_K").needed_bytes
    usage = os.statvfs(out)
    assert usage.f_bavail * usage.f_frsize > needed
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - 1}))
    assert convert(source, out / "m.gguf", "--llama-cpp", llama_cpp, "--gguf-type", "Q6_K") == 2
    assert capsys.readouterr().err == (
        f"mistral-large: {out / 'm.gguf'}: needs {needed:,} bytes, the disk has {needed - 1:,} free; make room or "
        "choose "
        "another disk\n"
    )
    assert not [*out.iterdir()]
    # What the steps write fills it, and that is no reason to throw the file away.
    full = llama_cpp / "full"
    write_quantizer(llama_cpp, f"{QUANTIZER}touch {full}\n")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": needed - full.exists()}))
    assert convert(source, out / "m.gguf", "--llama-cpp", llama_cpp, "--gguf-type", "Q6_K") == 0


@pytest.mark.slow
def test_a_vocabulary_that_the_converter_would_not_take_exactly_is_refused(
    llama_cpp: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = folders.fine_tune(tmp_path / "source")
    path = source / "tokenizer.json"
    content = json.loads(path.read_text())
    pieces = content["model"]["vocab"]
    pieces["other"] = pieces.pop(next(piece for piece, index in pieces.items() if index == 9999))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content))
    assert convert(source, out / "m.gguf", "--llama-cpp", llama_cpp) == 2
    assert "convert_hf_to_gguf.py loses the scores of such a vocabulary" in capsys.readouterr().err
    # Of bytes, the converter knows by itself whether it does.
    content["decoder"] = {"type": "ByteLevel"}
    path.write_text(json.dumps(content))
    assert convert(source, out / "m.gguf", "--llama-cpp", llama_cpp) == 0
    assert "tokenizer.model" not in json.loads((out / "m.gguf").read_text())["files"]


@pytest.mark.slow
def test_an_interrupt_ends_the_tool_and_nothing_stays(llama_cpp: Path, out: Path, tmp_path: Path) -> None:
    source = folders.vendor(tmp_path / "source")
    pid = tmp_path / "pid"
    write_quantizer(llama_cpp, f"#!/bin/sh\necho half > $2\ntrap '' INT\necho $$ > {pid}\nexec sleep 600\n")
    command = [sys.executable, "-m", "mistral_large_cli", "convert", str(source), str(out / "m.gguf"), "--to", "gguf"]
    command += ["--llama-cpp", str(llama_cpp), "--gguf-type", "Q6_K"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [*out.iterdir()]
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert not [*out.iterdir()]
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@pytest.mark.slow
def test_an_adapter_alone_is_refused(
    llama_cpp: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert convert(tmp_path / "adapter", out / "m.gguf", "--llama-cpp", llama_cpp) == 2
    assert "an adapter (PEFT)" in capsys.readouterr().err
