"""The snippets of the model cards, word for word with one import added, and repositories by their id."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import get_json_schema

from mistral_large_conversion.checkpoint.hub import cached_layout, find_consolidated
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer, load
from tests.support import folders
from tests.support.loopback_hub import COMMIT, LoopbackHub, in_place_of_the_hub

IMPORT = "import modeling_mistral_large\n"
PIPELINE = """\
from transformers import pipeline

messages = [
    {"role": "system", "content": "You are a pirate chatbot who always responds in pirate speak!"},
    {"role": "user", "content": "Who are you?"},
]
chatbot = pipeline("text-generation", model="REPOSITORY")
chatbot(messages)
"""
TOOLS = '''\
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch

model_id = "mistralai/Mistral-Large-Instruct-2407"
tokenizer = AutoTokenizer.from_pretrained(model_id)

def get_current_weather(location: str, format: str):
    """
    Get the current weather

    Args:
        location: The city and state, e.g. San Francisco, CA
        format: The temperature unit to use. Infer this from the users location. (choices: ["celsius", "fahrenheit"])
    """
    pass

conversation = [{"role": "user", "content": "What's the weather like in Paris?"}]
tools = [get_current_weather]

# format and tokenize the tool use prompt
inputs = tokenizer.apply_chat_template(
            conversation,
            tools=tools,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
)

model = AutoModelForCausalLM.from_pretrained(model_id, torch_dtype=torch.bfloat16, device_map="auto")

inputs.to(model.device)
outputs = model.generate(**inputs, max_new_tokens=1000)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))
'''
REPOSITORIES = ("mistralai/Mistral-Large-Instruct-2407", "mistralai/Mistral-Large-2407")


def whole(cache: Path, repository: str) -> None:
    folders.into_hub_cache(folders.vendor_whole(cache.parent / "whole"), cache, repository)


def hf_half(cache: Path, repository: str) -> None:
    folders.hub_cache(cache, repository=repository)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; the hub is not to be asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def run(snippet: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(IMPORT + snippet, "snippet", "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("repository", REPOSITORIES)
@pytest.mark.parametrize("fill", [whole, hf_half], ids=["both layouts", "HF half"])
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_the_pipeline_of_the_card_is_ours(fill: Any, repository: str, cache: Path) -> None:
    fill(cache, repository)
    names = run(PIPELINE.replace("REPOSITORY", repository))
    chatbot = names["chatbot"]
    assert (type(chatbot.model), type(chatbot.tokenizer)) == (MistralLargeForCausalLM, MistralLargeTokenizer)
    wanted = MistralTokenizer.v3().encode_chat_completion(ChatCompletionRequest(messages=names["messages"])).tokens
    assert chatbot.tokenizer.apply_chat_template(names["messages"], return_dict=False) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("fill", [whole, hf_half], ids=["both layouts", "HF half"])
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_the_tools_of_the_card_are_ours(fill: Any, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(cache, REPOSITORIES[0])
    names = run(TOOLS)
    assert (type(names["model"]), type(names["tokenizer"])) == (MistralLargeForCausalLM, MistralLargeTokenizer)
    assert str(names["model"].dtype) == "torch.bfloat16"
    schema: Any = get_json_schema(names["tools"][0])
    schema["function"].pop("return", None)
    request: Any = ChatCompletionRequest(messages=names["conversation"], tools=[schema])
    assert names["inputs"]["input_ids"][0].tolist() == MistralTokenizer.v3().encode_chat_completion(request).tokens
    assert "get_current_weather" in capsys.readouterr().out


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """The vendor's whole repository, and an empty cache."""
    with in_place_of_the_hub(LoopbackHub(folders.vendor_whole(tmp_path / "repository")), tmp_path / "cache") as hub:
        yield hub


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*(another program|prompts are v3)")
def test_a_cache_with_the_hf_half_is_read_and_not_downloaded_again(hub: LoopbackHub, tmp_path: Path) -> None:
    half = folders.vendor_hf_half(tmp_path / "half")
    folders.into_hub_cache(half, tmp_path / "cache", "owner/name", commit=COMMIT)
    assert cached_layout("owner/name", {}) == "hf"
    model, tokenizer = load("owner/name", dtype="bfloat16")
    assert (type(model), type(tokenizer)) == (MistralLargeForCausalLM, MistralLargeTokenizer)
    assert not {name for name in hub.downloaded if name.endswith(".safetensors")}
    assert model.state_dict().keys() == folders.hf_demo_weights().keys()


@pytest.mark.slow
def test_without_anything_cached_only_the_consolidated_files_are_downloaded(hub: LoopbackHub) -> None:
    load("owner/name", dtype="bfloat16")
    weights = {name for name in hub.downloaded if name.endswith(".safetensors")}
    assert weights == {f"consolidated-0000{number}-of-00002.safetensors" for number in (1, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["model-00002-of-00002.safetensors", "config.json"])
def test_half_of_a_half_is_not_whole(lost: str, tmp_path: Path, cache: Path) -> None:
    half = folders.vendor_hf_half(tmp_path / "half")
    (half / lost).unlink()
    folders.into_hub_cache(half, cache, "owner/name")
    assert cached_layout("owner/name", {}) is None


@pytest.mark.slow
def test_cached_consolidated_weights_win(cache: Path) -> None:
    whole(cache, REPOSITORIES[0])
    assert cached_layout(REPOSITORIES[0], {}) == "consolidated"
    assert find_consolidated(REPOSITORIES[0], {"local_files_only": True}) is not None
