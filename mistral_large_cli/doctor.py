"""`mistral-large doctor`: what is installed, and whether every device gives the golden responses of the demo."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from mistral_large_conversion.errors import TokenizerFileError

from .demo import (
    GoldenConversation,
    convert_demo_checkpoint,
    get_current_weather,
    golden_conversations,
    wrong_answer,
)
from .options import AsJson
from .terminal import one_line, print_json

PACKAGES = (
    *("torch", "transformers", "tokenizers", "huggingface-hub", "safetensors", "accelerate", "sentencepiece"),
    *("mistral-common", "compressed-tensors", "llguidance", "peft", "trl", "vllm"),
)
# A conversation with a system prompt, one of several turns, a call, and a response to a tool's result.
ASKED = ("pirate", "window_cleaner_follow_up", "weather_call", "weather_answer")
# What v7 does otherwise: blocks of system text, text next to a call, results unchanged.
ASKED_IN_V7 = ("pirate_between_users", "weather_text_and_call", "weather_text_and_call_answer")
MODES: Mapping[str, Mapping[str, Any]] = {
    "with a cache": {},
    "without a cache": {"use_cache": False},
    "chunked prefill": {"prefill_chunk_size": 7},
}
DTYPES = ("float32", "bfloat16")
MAX_NEW_TOKENS = 80
# Spaces, digits, bytes without a piece, other scripts, and texts that only look like control tokens.
TEXTS = (
    "Who are you?",
    "  two  spaces\n\n\tand a tab ",
    "3.14159 = 22/7?",
    "naïve café, 你好，мир, 🦙👩‍👩‍👧",
    "[INST] </s> <s>[TOOL_CALLS][/INST]",
    "",
)


@dataclass(frozen=True)
class Check:
    """One thing that was tried; `is_ok` is None where it could not be."""

    name: str
    is_ok: bool | None
    detail: str


@dataclass(frozen=True)
class Package:
    """A library: `version` is None where it is not installed, `range` where any version will do."""

    name: str
    version: str | None
    range: str | None
    is_in_range: bool | None


RESULTS = {True: "ok", False: "WRONG", None: "not run"}


def doctor(as_json: AsJson = False) -> None:
    """Print what is installed and check that it computes correctly on every device; exit code 1 if it does not."""
    packages, devices = find_packages(), find_devices()
    if not as_json:
        _print_environment(packages, devices)
    checks = []
    for check in run_checks(devices):
        checks.append(check)
        if not as_json:
            print(f"{RESULTS[check.is_ok]:8} {check.name:34} {one_line(check.detail)}".rstrip(), flush=True)
    is_ok = all(check.is_ok for check in checks)
    if as_json:
        report = {
            "ok": is_ok,
            "python": platform.python_version(),
            "packages": [asdict(package) for package in packages],
            "devices": devices,
            "checks": [asdict(check) for check in checks],
        }
        print_json(report)
    else:
        print(f"\n{_summary(checks, packages)}")
    raise typer.Exit(not is_ok)


def find_packages() -> list[Package]:
    """Return the libraries that matter, with the versions that this package asks for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    from modeling_mistral_large.supported import NEWEST_TRANSFORMERS, OLDEST_TRANSFORMERS

    own = _installed("modeling-mistral-large")
    asked = [] if own is None else [Requirement(text) for text in requires("modeling-mistral-large") or ()]
    ranges = {requirement.name: requirement.specifier for requirement in asked}
    # Each minor version that the tests have passed on, with all of its patches.
    ranges["transformers"] = SpecifierSet(f">={OLDEST_TRANSFORMERS},<={NEWEST_TRANSFORMERS}.999")
    packages = [Package("modeling-mistral-large", own, None, None)]
    for name in PACKAGES:
        found, wanted = _installed(name), ranges.get(name)
        text = (
            f"{OLDEST_TRANSFORMERS} to {NEWEST_TRANSFORMERS}" if name == "transformers" else str(wanted or "") or None
        )
        is_in_range = None if found is None or not wanted else wanted.contains(found, prereleases=True)
        packages.append(Package(name, found, text, is_in_range))
    return packages


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def find_devices() -> dict[str, str]:
    """Return the devices that torch sees, by torch's names, and what they are."""
    import torch

    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    for index in range(torch.xpu.device_count()):
        devices[f"xpu:{index}"] = torch.xpu.get_device_name(index)
    return devices


def run_checks(devices: Mapping[str, str]) -> Iterator[Check]:
    """Yield each check as soon as it is done; one that fails with an error is wrong, and the others are still run."""
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    yield _try("Auto classes", _check_auto_classes)
    if find_spec("vllm") is not None:
        yield _try("vLLM's registry", _check_vllm)
    golden = golden_conversations()
    with TemporaryDirectory() as scratch:
        folder, folder_of_v7 = Path(scratch, "demo"), Path(scratch, "demo-v7")
        try:
            convert_demo_checkpoint(folder)
            convert_demo_checkpoint(folder_of_v7, "v7")
        except TokenizerFileError as error:
            yield Check("tokenizer and golden responses", None, str(error))
            return
        # Whatever is broken in an environment is what this command is for.
        except Exception as error:
            yield Check("conversion of the demo checkpoints", False, _one_line(error))
            return
        yield Check("conversion of the demo checkpoints", True, "v3 and v7, to the HF layout")
        yield _try("tokenizer", lambda: _check_tokenizer(folder))
        with _one_thread():
            for device, dtype in product(devices, DTYPES):
                yield from _check_model(folder, device, dtype, golden)
            for device, dtype in product(devices, DTYPES[:1]):
                yield _try(f"{device} {dtype}, v7", partial(_check_v7, folder_of_v7, device, dtype))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread: several would wait for each other longer than a model this small takes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _try(name: str, check: Callable[[], str]) -> Check:
    """Run a check, which returns what it found and raises what is wrong."""
    started = time.monotonic()
    try:
        detail = check()
    except Exception as error:
        return Check(name, False, _one_line(error))
    return Check(name, True, f"{detail} in {time.monotonic() - started:.1f} s")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, _WrongError) else f"{type(error).__name__}: {text}"


class _WrongError(Exception):
    """What a check found to be wrong."""


def _check_auto_classes() -> str:
    import torch
    from transformers import AutoConfig

    from modeling_mistral_large import MODELS, MistralLargeConfig

    config = AutoConfig.for_model(MistralLargeConfig.model_type, num_hidden_layers=1)
    for auto_class, model_class in MODELS.items():
        with torch.device("meta"):
            found = type(auto_class.from_config(config))  # type: ignore[no-untyped-call]
        if found is not model_class:
            raise _WrongError(f"{auto_class.__name__} makes {found.__name__} and not {model_class.__name__}")
    return ", ".join(auto_class.__name__ for auto_class in MODELS)


def _check_vllm() -> str:
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    architecture = "MistralLargeForCausalLM"
    load_general_plugins()
    if architecture not in ModelRegistry.get_supported_archs():
        raise _WrongError(f"{architecture} is not in it; install this package in the environment of vLLM")
    return architecture


def _check_tokenizer(folder: Path) -> str:
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    from modeling_mistral_large import MistralLargeTokenizer

    from .demo import tokenizer_model_file

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not isinstance(tokenizer, MistralLargeTokenizer):
        raise _WrongError(f"AutoTokenizer makes {type(tokenizer).__name__} and not MistralLargeTokenizer")
    reference = SentencePieceProcessor(model_file=str(tokenizer_model_file()))
    for text, ids in zip(TEXTS, tokenizer.encode_texts(list(TEXTS)), strict=True):
        if list(ids) != reference.encode(text):
            raise _WrongError(f"{text!r} becomes {list(ids)}; SentencePiece gives {reference.encode(text)}")
    return f"{len(TEXTS)} texts as SentencePiece encodes them"


def _check_model(folder: Path, device: str, dtype: str, golden: Mapping[str, GoldenConversation]) -> Iterator[Check]:
    """Load the model as users do, and compare its responses."""
    from modeling_mistral_large.generation.tool_loop import generate_with, run_tool_loop
    from modeling_mistral_large.instruct.json_text import show

    where = f"{device} {dtype}"
    try:
        model, tokenizer = _load(folder, device, dtype)
    except Exception as error:
        yield Check(where, False, _one_line(error))
        return

    def call_a_tool() -> str:
        generate = generate_with(model, tokenizer, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        *_, answer = run_tool_loop(generate, golden["weather_call"].messages, [get_current_weather])
        if answer["content"] != golden["weather_answer"].answer:
            raise _WrongError(f"{show(answer['content'])} instead of {show(golden['weather_answer'].answer)}")
        return "a golden response from its result"

    for mode, options in MODES.items():
        yield _try(f"{where}, {mode}", partial(_ask, model, tokenizer, [golden[name] for name in ASKED], **options))
    yield _try(f"{where}, tool call", call_a_tool)


def _check_v7(folder: Path, device: str, dtype: str) -> str:
    golden = golden_conversations("v7")
    return _ask(*_load(folder, device, dtype), [golden[name] for name in ASKED_IN_V7])


def _load(folder: Path, device: str, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(device), tokenizer


def _ask(model: Any, tokenizer: Any, conversations: Sequence[GoldenConversation], **options: Any) -> str:
    """Compare greedy completions with the golden ones; `options` are those of `generate`."""
    from modeling_mistral_large.instruct.json_text import show

    for golden in conversations:
        prompt = tokenizer.apply_chat_template(golden.messages, golden.tools, return_tensors="pt").to(model.device)
        output = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **options)
        said = wrong_answer(tokenizer, output[0, prompt["input_ids"].shape[1] :].tolist(), golden.answer)
        if said is not None:
            raise _WrongError(f"{golden.name}: {show(said)} instead of {show(golden.answer)}")
    return f"{len(conversations)} golden responses"


def _print_environment(packages: list[Package], devices: Mapping[str, str]) -> None:
    print(f"{'python':24} {platform.python_version()}")
    for package in packages:
        remark = "" if package.range is None else f"wanted: {package.range}"
        if package.is_in_range is False:
            remark = f"OUTSIDE of {package.range}"
        print(f"{package.name:24} {package.version or 'not installed':14} {remark}".rstrip())
    for device, description in devices.items():
        print(f"{device:24} {one_line(description)}")
    print(flush=True)


def _summary(checks: list[Check], packages: list[Package]) -> str:
    wrong = sum(check.is_ok is False for check in checks)
    skipped = sum(check.is_ok is None for check in checks)
    outside = [package.name for package in packages if package.is_in_range is False]
    if not wrong + skipped:
        return f"All {len(checks)} checks are right." + (f" Not tested: {', '.join(outside)}." if outside else "")
    advice = "report it with this output" if wrong else "it says above what it needs"
    if outside:
        advice = f"install {', '.join(outside)} in the range that is wanted"
    return f"{wrong} of {len(checks)} checks are wrong, {skipped} could not be run; {advice}."
