"""Every path of decoding on a GPU, and its twin on the CPU: recorded steps of each kind of weights and cache, used by
`generate` itself, batches, drafts, and the way back to transformers' own loop.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling_mistral_large.generation import RecordedCache, record_decoding, release_recording
from modeling_mistral_large.inference.kv_cache import Fp8Cache
from modeling_mistral_large.recorded_steps import automatic, decoding
from modeling_mistral_large.transformers_api.keywords import cache_argument, cache_in
from tests.support.devices import on_both_devices, use_kernels_of
from tests.support.gpu_models import CONFIG, random_model
from tests.support.gpu_products import relative_error
from tests.support.models import PAD, left_padded, random_ids

TESTS = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
PLAIN: dict[str, Any] = {"cache_implementation": "dynamic"}
WEIGHTS = ["bf16", "fp8", "int4"]
# Of logits: what BF16 rounds differently, and what is rounded to FP8 in another place.
NEAR = {"bf16": 0.015, "fp8": 0.05, "int4": 0.015}


@pytest.fixture(autouse=True)
def kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    use_kernels_of(device, monkeypatch)


def nearly_greedy(model: Any, output: Tensor, prompt: int, mask: Tensor | None = None) -> bool:
    """Whether each new token is nearly the most likely one by the model's own forward."""
    mask = torch.ones_like(output[:, :prompt]) if mask is None else mask
    mask = torch.cat((mask, torch.ones_like(output[:, prompt:])), dim=-1)
    with torch.no_grad():
        logits = model(output, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits.float()
    logits = logits[:, prompt - 1 : -1]
    chosen = logits.gather(-1, output[:, prompt:, None])[..., 0]
    return bool((logits.amax(-1) - chosen).max() < 0.1 * logits.std())


@pytest.mark.slow
@on_both_devices
@pytest.mark.parametrize("weights", WEIGHTS)
def test_generate_is_recorded(weights: str, device: str) -> None:
    model = random_model(device, weights)
    for length in (9, 5):
        ids = random_ids(CONFIG, 1, length).to(device)
        found = model.generate(ids, **OPTIONS, return_dict_in_generate=True, output_logits=True)
        assert isinstance(cache_in(found), RecordedCache)
        assert nearly_greedy(model, found.sequences, length)
        with torch.no_grad():
            own = model(found.sequences[:, :-1]).logits[:, -1]
        assert relative_error(found.logits[-1], own) < NEAR[weights]


@on_both_devices
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_padded_batch(weights: str, device: str) -> None:
    model = random_model(device, weights)
    ids, mask = (each.to(device) for each in left_padded(CONFIG, [6, 9, 2]))
    output = model.generate(ids, attention_mask=mask, **OPTIONS)
    assert automatic._kept[model].filled == output.shape[1] - 1
    assert nearly_greedy(model, output, 9, mask)


@on_both_devices
def test_a_cache_in_fp8(device: str) -> None:
    model = random_model(device, "bf16")
    ids = random_ids(CONFIG, 1, 9).to(device)
    cache = RecordedCache(record_decoding(model, 40, cache="fp8"))
    logits = []
    for each in (cache, Fp8Cache(CONFIG)):
        with torch.no_grad():
            model(ids[:, :8], **cache_argument(each))
            logits.append(model(ids[:, 8:], **cache_argument(each)).logits)
    assert relative_error(*logits) < 0.03


@on_both_devices
def test_the_cache_grows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "ROOM_AHEAD", 1)
    monkeypatch.setattr(decoding, "LEAST_SLOTS", 8)
    monkeypatch.setattr(decoding, "MOST_ROWS", 2)
    model = random_model(device, "bf16")
    ids = random_ids(CONFIG, 1, 6).to(device)
    output = model.generate(ids, **{**OPTIONS, "max_new_tokens": 6})
    assert automatic._kept[model].slots > 8
    assert nearly_greedy(model, output, 6)


@on_both_devices
@pytest.mark.parametrize("drafted", ["draft", "lookup"])
def test_drafts(drafted: str, device: str) -> None:
    """Checked by one step of several rows."""
    model = random_model(device, "bf16")
    ids = random_ids(CONFIG, 1, 5).to(device).repeat(1, 2)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if drafted == "draft":
        draft = random_model(device, "bf16")
        draft.load_state_dict(model.state_dict())
        draft.generation_config.num_assistant_tokens = 3
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        options = {"assistant_model": draft}
    output = model.generate(ids, **{**OPTIONS, "max_new_tokens": 6}, **options)
    assert automatic._kept[model].filled >= output.shape[1] - 1
    assert nearly_greedy(model, output, 10)


@on_both_devices
def test_what_falls_back(device: str) -> None:
    """Hooks inside the model, the switch, and beams; in one model, which is recorded again afterwards."""
    model = random_model(device, "bf16")
    ids = random_ids(CONFIG, 1, 6).to(device)
    plain = model.generate(ids, **OPTIONS, **PLAIN)
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert torch.equal(model.generate(ids, **OPTIONS), plain)
    handle.remove()
    model.use_cuda_graph = False
    assert torch.equal(model.generate(ids, **OPTIONS), plain)
    model.use_cuda_graph = True
    model.generate(ids, **OPTIONS, num_beams=2)
    assert model not in automatic._kept
    model.generate(ids, **OPTIONS)
    assert model in automatic._kept


@on_both_devices
def test_memory_is_released(device: str) -> None:
    model = random_model(device, "bf16")
    ids = random_ids(CONFIG, 1, 6).to(device)
    model.generate(ids, **OPTIONS, **PLAIN)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    model.generate(ids, **OPTIONS)
    release_recording(model)
    assert model not in automatic._kept
    # What CUDA keeps for graphs is small.
    assert (torch.cuda.memory_allocated() if device == "cuda" else 0) <= before + 2**20


@pytest.mark.parametrize("device", ["cpu"])
def test_every_test_of_a_gpu_has_a_twin(device: str) -> None:
    """The marker is given where the twin is.

    The test of the kernels is its own, in the interpreter; that of loading has its devices, and a stand-in for streams.
    """
    marked = {
        str(path.relative_to(TESTS))
        for path in TESTS.rglob("*.py")
        if re.search(r"mark\.cuda\b", path.read_text(encoding="utf-8")) and path != Path(__file__)
    }
    assert marked == {
        "support/devices.py",
        "modeling/inference/test_gpu_kernels.py",
        "modeling/test_streamed_weights.py",
    }
    assert [str(each.values[0]) for each in on_both_devices.mark.args[1]] == ["cpu", "cuda"]
