"""Folders for stock transformers and engines: written by the converter, or switched by `mistral-large retag`."""

import json
import os
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from transformers import AutoConfig, AutoTokenizer

import mistral_large_conversion.retag as retag_module
from mistral_large_conversion.chat_templates import PLAIN_CHAT_TEMPLATES
from mistral_large_conversion.checkpoint.atomic_write import write_file
from mistral_large_conversion.checkpoint.read import load_headers
from mistral_large_conversion.errors import CheckpointError, DestinationError
from mistral_large_conversion.folder_checks import manifest_problems
from mistral_large_conversion.hf_files import hf_files
from mistral_large_conversion.manifest import read_manifest
from mistral_large_conversion.model_card import ModelType
from mistral_large_conversion.retag import retag_checkpoint
from mistral_large_conversion.verify import verify_checkpoint
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from tests.support.checkpoints import contents
from tests.support.command import run
from tests.support.edits import Edit, content, remove, set_json
from tests.support.errors import raises_exactly, whole
from tests.support.texts import SNIPPETS, every_code_point, mixed_texts
from tests.support.warm_python import WarmPython

WEIGHTS = "model.safetensors"
MANIFEST, MODULE = "conversion.manifest.json", "modeling_mistral_large_remote.py"
CHANGED = ["chat_template.jinja", "README.md", "tokenizer_config.json", "config.json"]
CHANGED_TO = {"mistral": [MANIFEST, *CHANGED, MODULE], "mistral_large": [MANIFEST, MODULE, *CHANGED]}

# Run by an interpreter that must not see this package.
STOCK = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, cases, out = sys.argv[1:]
cases = json.load(open(cases))
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.tensor([cases["ids"]])).logits
torch.save(logits, out)
answer = transformers.pipeline("text-generation", folder, dtype="float32")(
    cases["messages"], do_sample=False, max_new_tokens=64
)[0]["generated_text"][-1]
ids = [tokenizer(text).input_ids for text in cases["texts"]]
print(json.dumps({
    "modules": [name for name in sys.modules if name.startswith(("modeling_mistral_large", "mistral_large_cli"))],
    "classes": [type(model).__name__, type(tokenizer).__name__],
    "ids": ids,
    "decoded": [tokenizer.decode(each, skip_special_tokens=True) for each in ids],
    "prompt": tokenizer.apply_chat_template(cases["messages"], return_dict=False),
    "sliding_window": model.config.sliding_window,
    "rope": model.config.rope_parameters,
    "padding": [tokenizer.padding_side, tokenizer.pad_token_id],
    "response_template": tokenizer.response_template,
    "inputs": list(tokenizer("x")),
    "answer": answer,
}))
"""


@pytest.mark.slow
def test_stock_transformers_reads_a_retagged_folder_without_us(
    folder: Path, tmp_path: Path, sentencepiece_processor: Any, warm_python: WarmPython
) -> None:
    retag_checkpoint(folder, "mistral")
    # Stock tokenizers take control strings in texts for control tokens; that is what our class is for.
    texts = [*SNIPPETS, *islice(every_code_point(), 0, None, 16), *mixed_texts(["x"] * 750, seed=7, count=4000)]
    texts = [text for text in texts if not any(mark in text for mark in ("[", "<"))]
    assert len(texts) > 6000
    ids = torch.randint(3, 32768, (33,)).tolist()
    messages = [
        {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
        {"role": "user", "content": "Who are you?"},
    ]
    (tmp_path / "cases.json").write_text(json.dumps({"texts": texts, "ids": ids, "messages": messages}))
    done = subprocess.run(
        [warm_python.python, "-c", STOCK, str(folder), str(tmp_path / "cases.json"), str(tmp_path / "logits.pt")],
        env=warm_python.environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["modules"] == []
    assert found["classes"][0] == "MistralForCausalLM"
    expected = sentencepiece_processor.encode(texts)
    assert found["ids"] == [[1, *each] for each in expected]
    assert found["decoded"] == sentencepiece_processor.decode(expected)
    ours = MistralLargeTokenizer.from_pretrained(folder)
    assert found["prompt"] == ours.apply_chat_template(messages, return_dict=False)
    assert found["sliding_window"] is None
    assert found["rope"] == {"rope_type": "default", "rope_theta": 1e6}
    assert found["padding"] == ["left", 384]
    assert found["response_template"] == ours.response_template
    assert found["inputs"] == ["input_ids", "attention_mask"]
    assert found["answer"]["role"] == "assistant"
    retag_checkpoint(folder, "mistral_large")
    model = MistralLargeForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


@pytest.mark.slow
def test_our_tokenizer_is_as_exact_in_a_folder_for_others(folder: Path, reference_tokenizer: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "[INST] </s> a  b"}]
    request = ChatCompletionRequest(messages=messages)
    expected = reference_tokenizer.encode_chat_completion(request).tokens
    retag_checkpoint(folder, "mistral")
    ours = MistralLargeTokenizer.from_pretrained(folder)
    assert ours.apply_chat_template(messages, return_dict=False) == expected
    masked = ours.apply_chat_template(
        [*messages, {"role": "assistant", "content": "yes"}], return_assistant_tokens_mask=True
    )
    assert sum(masked["assistant_masks"]) == 2


@pytest.mark.slow
def test_retagging_touches_no_weights_and_goes_back_to_the_same_bytes(folder: Path) -> None:
    before, stat = contents(folder), (folder / WEIGHTS).stat()
    assert retag_checkpoint(folder, "mistral_large") == []
    assert contents(folder) == before
    assert retag_checkpoint(folder, "mistral") == CHANGED_TO["mistral"]
    after = contents(folder)
    assert {name for name in before if after.get(name) != before[name]} == set(CHANGED_TO["mistral"])
    assert after.keys() == before.keys() - {MODULE}
    # Readers that do not take rope_theta from where it is now.
    assert json.loads(after["config.json"])["rope_theta"] == 1e6
    assert retag_checkpoint(folder, "mistral") == []
    assert contents(folder) == after
    assert retag_checkpoint(folder, "mistral_large") == CHANGED_TO["mistral_large"]
    assert contents(folder) == before
    now = (folder / WEIGHTS).stat()
    assert (now.st_ino, now.st_mtime_ns, now.st_ctime_ns) == (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns)


@pytest.mark.slow
def test_the_converter_writes_what_retagging_writes(folder: Path, demo_folder: Path) -> None:
    def written(model_type: ModelType) -> dict[str, bytes]:
        geometry = load_headers(demo_folder).geometry
        options: dict[str, Any] = {"quantization": None, "dtype": "BF16", "source": demo_folder}
        return hf_files(geometry, model_type=model_type, **options)

    model_types: tuple[ModelType, ...] = ("mistral", "mistral_large")
    for model_type in model_types:
        files = written(model_type)
        retag_checkpoint(folder, model_type)
        after = contents(folder)
        assert {name: after[name] for name in files} == files
        assert set(after) - set(files) <= {WEIGHTS, "conversion.manifest.json"}
    assert b"generation -%}" not in written("mistral")["chat_template.jinja"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mistral", "mistral_large"])
def test_an_interrupted_retagging_leaves_a_folder_that_loads(
    folder: Path, model_type: ModelType, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: ModelType = "mistral_large" if model_type == "mistral" else "mistral"
    retag_checkpoint(folder, other)
    expected_ids = MistralLargeTokenizer.from_pretrained(folder).encode("a  b   c")
    original = write_file
    files = CHANGED_TO[model_type]
    for stop in range(1, 5):
        count = 0

        def stopping(path: Path, content: bytes, stop: int = stop) -> None:
            nonlocal count
            count += 1
            if count > stop:
                raise OSError(28, "No space left on device")
            original(path, content)

        monkeypatch.setattr(retag_module, "write_file", stopping)
        with raises_exactly(
            DestinationError,
            f"{folder}: not retagged: [Errno 28] No space left on device; when that is fixed, run it again",
        ):
            retag_checkpoint(folder, model_type)
        assert AutoConfig.from_pretrained(folder).hidden_size == 64
        assert AutoTokenizer.from_pretrained(folder).encode("a  b   c") == expected_ids
        monkeypatch.setattr(retag_module, "write_file", original)
        assert retag_checkpoint(folder, model_type) == files[stop:]
        manifest = read_manifest(folder)
        assert manifest is not None
        assert manifest_problems(folder, manifest) == []
        retag_checkpoint(folder, other)


@pytest.mark.slow
def test_a_retagged_folder_is_proven_unless_it_was_changed_before(folder: Path) -> None:
    model_types: tuple[ModelType, ...] = ("mistral", "mistral_large")
    for model_type in model_types:
        retag_checkpoint(folder, model_type)
        assert all(check.is_ok for check in verify_checkpoint(folder))
    set_json(folder / "tokenizer_config.json", pad_token="</s>")
    for model_type in model_types:
        retag_checkpoint(folder, model_type)
        wrong = {check.name: check.detail for check in verify_checkpoint(folder) if not check.is_ok}
        assert wrong == {"files": "tokenizer_config.json has changed since the conversion"}


@pytest.mark.slow
def test_an_interrupted_retagging_can_be_taken_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    original = write_file

    def failing(path: Path, content: bytes) -> None:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        original(path, content)

    monkeypatch.setattr(retag_module, "write_file", failing)
    with pytest.raises(DestinationError):
        retag_checkpoint(folder, "mistral")
    assert not all(check.is_ok for check in verify_checkpoint(folder))
    monkeypatch.setattr(retag_module, "write_file", original)
    retag_checkpoint(folder, "mistral_large")
    assert contents(folder) == before


@pytest.mark.slow
def test_what_others_have_added_stays(folder: Path) -> None:
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"my_key": [1]},
        "tokenizer_config.json": {"my_key": [1]},
    }
    for name, change in changes.items():
        set_json(folder / name, **change)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "README.md").write_bytes(b"# My fine-tune \xff")
    assert retag_checkpoint(folder, "mistral") == [MANIFEST, "tokenizer_config.json", "config.json", MODULE]
    assert json.loads((folder / "config.json").read_text())["my_key"] == [1]
    # Nothing says that the format is ours.
    assert json.loads((folder / "tokenizer_config.json").read_text())["prompt_format"] is None
    retag_checkpoint(folder, "mistral_large")
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (folder / "README.md").read_bytes() == b"# My fine-tune \xff"
    assert json.loads((folder / "config.json").read_text())["my_key"] == [1]


@pytest.mark.slow
def test_a_template_of_ours_is_known_whatever_an_editor_did_to_it(folder: Path) -> None:
    path, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    assert json.loads(settings.read_text())["prompt_format"] == "v3"
    # As an earlier version wrote it.
    set_json(settings, prompt_format=None)
    path.write_bytes(b"\xef\xbb\xbf{# mine -#}\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert retag_checkpoint(folder, "mistral") == CHANGED_TO["mistral"]
    assert path.read_text() == PLAIN_CHAT_TEMPLATES["v3"]
    assert json.loads(settings.read_text())["prompt_format"] == "v3"


@pytest.mark.slow
def test_a_config_of_an_older_transformers_keeps_its_theta(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    theta = settings.pop("rope_parameters")["rope_theta"]
    (folder / "config.json").write_text(json.dumps({**settings, "rope_theta": theta}))
    for model_type in ("mistral", "mistral_large"):
        retag_checkpoint(folder, model_type)
        assert json.loads((folder / "config.json").read_text())["rope_theta"] == theta
        assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == theta


def link(name: str) -> Edit:
    def act(folder: Path) -> None:
        (folder / name).rename(folder / f"{name}.target")
        (folder / name).symlink_to(f"{name}.target")

    return act


INCOMPLETE = " is not a complete hf checkpoint; nothing was done, fix or download it again:\n  "
NOT_AS_CONVERTED = ": cannot be retagged, it is not as it was converted: "
AGAIN = "convert it again"
TOKENIZER_RULE = (
    "this package reads the v3 and v7 SentencePiece models of Mistral-Large-Instruct-2407 and 2411; pass a folder with "
    "tokenizer.model.v3 or .v7, or with the files that save_pretrained wrote"
)
# Each with what is said after the folder.
REFUSED: dict[str, tuple[Edit, str]] = {
    "unfinished": (
        content("conversion.unfinished", b""),
        ": an unfinished conversion; run `mistral-large convert` again first",
    ),
    "no config": (remove("config.json"), f"{INCOMPLETE}config.json is missing"),
    "another model": (
        content("config.json", b'{"model_type": "llama"}'),
        f"{INCOMPLETE}config.json: model_type is 'llama': only 'mistral' is this architecture<*>",
    ),
    "no weights": (remove(WEIGHTS), f"{INCOMPLETE}no model.safetensors and no model-00001-of-….safetensors"),
    "truncated": (
        lambda folder: os.truncate(folder / WEIGHTS, 10**6),
        f"{INCOMPLETE}model.safetensors: is cut short: has 1000000 bytes, its header needs <*>",
    ),
    "no tokenizer": (
        remove("tokenizer.json"),
        f"{NOT_AS_CONVERTED}<*>/tokenizer.json: no such file; {TOKENIZER_RULE}; {AGAIN}",
    ),
    "a foreign tokenizer": (
        content("tokenizer.json", b"{}"),
        f"{NOT_AS_CONVERTED}<*>/tokenizer.json: not a tokenizer.json (<*>); {TOKENIZER_RULE}; {AGAIN}",
    ),
    "no tokenizer config": (
        remove("tokenizer_config.json"),
        f"{NOT_AS_CONVERTED}tokenizer_config.json is missing; tokenizer_config.json: [Errno 2] No such file or "
        "directory: "
        f"'<*>'; {AGAIN}",
    ),
    "tokenizer config not JSON": (
        content("tokenizer_config.json", b"{"),
        f"{NOT_AS_CONVERTED}tokenizer_config.json: Expecting <*>; {AGAIN}",
    ),
    "no template": (remove("chat_template.jinja"), f"{NOT_AS_CONVERTED}chat_template.jinja is missing; {AGAIN}"),
    "no model card": (remove("README.md"), f"{NOT_AS_CONVERTED}README.md is missing; {AGAIN}"),
    "config a link": (
        link("config.json"),
        f"{NOT_AS_CONVERTED}config.json is a link: its target would not change; {AGAIN}",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_an_unknown_folder_is_refused_and_stays_as_it_is(
    folder: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    act, problem = REFUSED[case]
    act(folder)
    before = contents(folder)
    with pytest.raises(CheckpointError, match=whole(f"{folder}{problem}")) as error:
        retag_checkpoint(folder, "mistral")
    assert run("retag", folder, "--as", "mistral") == 2
    assert capsys.readouterr().err == f"mistral-large: {error.value}\n"
    assert contents(folder) == before


@pytest.mark.slow
def test_the_command_says_what_it_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for expected in (f"changed {', '.join(CHANGED_TO['mistral'])}", "unchanged"):
        assert run("retag", folder, "--as", "mistral") == 0
        assert capsys.readouterr().out == f"{folder}: model type mistral; {expected}\n"
    assert (folder / "chat_template.jinja").read_text() == PLAIN_CHAT_TEMPLATES["v3"]
