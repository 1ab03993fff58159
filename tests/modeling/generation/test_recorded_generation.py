"""`generate`, the pipeline and chat decode by recorded steps by themselves, with the results of transformers' own loop.

The kernels of a step are torch's here, see `tests/support/torch_kernels.py`, so nothing needs Triton or a GPU.
"""

import copy
import functools
import gc
import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mistral_large_cli.demo import golden_conversations
from mistral_large_cli.generation_session import GenerationSession
from mistral_large_cli.sampling import Sampling
from mistral_large_conversion.errors import SettingError
from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM, MistralLargeTokenizer, pipeline
from modeling_mistral_large.generation import RecordedCache, constrain, record_decoding, release_recording
from modeling_mistral_large.quantization import Nvfp4Linear
from modeling_mistral_large.recorded_steps import automatic, decoding, obstacles
from modeling_mistral_large.transformers_api.keywords import cache_argument, cache_in
from tests.support import torch_kernels
from tests.support.errors import raises_exactly
from tests.support.models import left_padded, random_ids

GOLDEN = golden_conversations()
GREEDY: dict[str, Any] = {"max_new_tokens": 96, "do_sample": False}
# One call without recorded steps.
PLAIN: dict[str, Any] = {"cache_implementation": "dynamic"}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step that was run."""
    return torch_kernels.use(monkeypatch)


@pytest.fixture(scope="module")
def demo(demo_folder: Path) -> Any:
    return MistralLargeForCausalLM.from_pretrained(demo_folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def demo_tokenizer(demo_folder: Path) -> MistralLargeTokenizer:
    return MistralLargeTokenizer.from_pretrained(demo_folder)


@pytest.fixture
def model(demo: Any, steps: list[int]) -> Any:
    """The demo, which has recorded nothing."""
    release_recording(demo)
    yield demo
    release_recording(demo)


@pytest.fixture
def tiny(tiny_config: MistralLargeConfig, steps: list[int]) -> Any:
    torch.manual_seed(0)
    return tiny_model(tiny_config)


def tiny_model(config: MistralLargeConfig, std: float = 0.15) -> Any:
    made: Any = MistralLargeForCausalLM._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=std)
    return made.eval()


def prompt_of(tokenizer: MistralLargeTokenizer, name: str) -> Any:
    golden = GOLDEN[name]
    return tokenizer.apply_chat_template(golden.messages, tools=golden.tools, return_tensors="pt")


@pytest.fixture(scope="module")
def plain_of(demo: Any, demo_tokenizer: MistralLargeTokenizer) -> Callable[[str], Tensor]:
    """The demo's greedy sequence of a golden prompt without recorded steps, made once for all tests."""

    @functools.cache
    def sequence(name: str) -> Tensor:
        made: Tensor = demo.generate(**prompt_of(demo_tokenizer, name), **GREEDY, **PLAIN)
        return made

    return lambda name: sequence(name).clone()


# A call is enough for every edit.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "weather_call")) for name in GOLDEN]
)
def test_golden_prompts(
    name: str, model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int], plain_of: Callable[[str], Tensor]
) -> None:
    prompt = prompt_of(demo_tokenizer, name)
    plain = plain_of(name)
    assert not steps
    found = model.generate(**prompt, **GREEDY)
    assert torch.equal(found, plain)
    new = found.shape[1] - prompt["input_ids"].shape[1]
    assert steps == [1] * (new - 1)
    assert demo_tokenizer.decode(found[0, -new:]) == f"{GOLDEN[name].answer}</s>"


@pytest.mark.slow
def test_one_recording_for_many_calls(
    model: Any,
    demo_tokenizer: MistralLargeTokenizer,
    plain_of: Callable[[str], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [*GOLDEN][:4]
    expected = [plain_of(name) for name in names]
    made = counted_recordings(monkeypatch)
    prompts = [prompt_of(demo_tokenizer, name) for name in names]
    found = [model.generate(**prompt, **GREEDY) for prompt in prompts]
    assert len(made) == 1
    for each, plain in zip(found, expected, strict=True):
        assert torch.equal(each, plain)
    # A plain call takes the memory of the recording.
    assert torch.equal(model.generate(**prompts[0], **GREEDY, **PLAIN), expected[0])
    made.clear()
    model.generate(**prompts[0], **GREEDY)
    assert len(made) == 1
    # Another number of sequences has a cache of another shape.
    prompt = demo_tokenizer.pad({"input_ids": [[1, 5], [1, 5, 6]]}, return_tensors="pt")
    model.generate(**prompt, **GREEDY)
    assert len(made) == 2


def counted_recordings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    made: list[Any] = []
    original = decoding.RecordedDecoding.__init__

    def counted(self: Any, *args: Any) -> None:
        made.append(args)
        original(self, *args)

    monkeypatch.setattr(decoding.RecordedDecoding, "__init__", counted)
    return made


@pytest.mark.slow
def test_a_padded_batch(model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int]) -> None:
    names = [name for name in GOLDEN if GOLDEN[name].tools is None][:5]
    prompts = [prompt_of(demo_tokenizer, name)["input_ids"][0].tolist() for name in names]
    inputs = demo_tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    assert bool((inputs["attention_mask"] == 0).any())
    plain = model.generate(**inputs, **GREEDY, **PLAIN)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert {*steps} == {5}


def test_padding_of_random_lengths(tiny: Any, tiny_config: MistralLargeConfig, steps: list[int]) -> None:
    ids, mask = left_padded(tiny_config, [17, 3, 9, 1])
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": 384}
    output: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    plain = tiny.generate(ids, **settings, **output, **PLAIN)
    found = tiny.generate(ids, **settings, **output)
    assert {*steps} == {4}
    # The last token may be a close call.
    assert torch.equal(found.sequences[:, :-1], plain.sequences[:, :-1])
    for one, other in zip(found.logits, plain.logits, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize("returned", [1, 3])
def test_samples_of_a_seed(returned: int, model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int]) -> None:
    prompt = prompt_of(demo_tokenizer, next(iter(GOLDEN)))
    settings = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 24, "num_return_sequences": returned}

    def sampled(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = model.generate(**prompt, **settings, **options)
        return found

    found = [sampled(seed) for seed in range(2)]
    assert {*steps} == {returned}
    assert [each.tolist() for each in found] == [sampled(seed, **PLAIN).tolist() for seed in range(2)]


@pytest.mark.slow
def test_logits_processors_and_scores(model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int]) -> None:
    prompt = prompt_of(demo_tokenizer, "weather_call")
    options: dict[str, Any] = {**GREEDY, "repetition_penalty": 1.3, "min_new_tokens": 40, "max_new_tokens": 48}
    plain = model.generate(**prompt, **options, **PLAIN, return_dict_in_generate=True, output_scores=True)
    found = model.generate(**prompt, **options, return_dict_in_generate=True, output_scores=True)
    assert steps
    assert torch.equal(found.sequences, plain.sequences)
    assert len(found.scores) == len(plain.scores)


@pytest.mark.slow
def test_structured_output(model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int]) -> None:
    pytest.importorskip("llguidance", reason="structured output needs llguidance")
    golden = GOLDEN["weather_call"]
    prompt = prompt_of(demo_tokenizer, "weather_call")
    processors = constrain(demo_tokenizer, tools=golden.tools, tool_choice="required")
    found = model.generate(**prompt, **GREEDY, logits_processor=processors)
    assert torch.equal(found, model.generate(**prompt, **GREEDY, **PLAIN, logits_processor=processors))
    assert steps


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.is_ended = False

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.is_ended = True


@pytest.mark.slow
def test_streaming_and_stopping(
    model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int], plain_of: Callable[[str], Tensor]
) -> None:
    prompt = prompt_of(demo_tokenizer, "weather_call")
    length = prompt["input_ids"].shape[1]

    class Enough(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= length + 5)

    streamer = Kept()
    stopped = model.generate(**prompt, **GREEDY, streamer=streamer, stopping_criteria=StoppingCriteriaList([Enough()]))
    whole = plain_of("weather_call")
    assert stopped.tolist() == [streamer.ids] == whole[:, : length + 5].tolist()
    assert streamer.is_ended
    # The next call is not touched by what was left.
    assert torch.equal(model.generate(**prompt, **GREEDY), whole)
    assert steps


@pytest.mark.slow
def test_a_call_that_breaks_off(
    model: Any, demo_tokenizer: MistralLargeTokenizer, plain_of: Callable[[str], Tensor]
) -> None:
    prompt = prompt_of(demo_tokenizer, "weather_call")
    forwards: list[int] = []

    def fail(*_: Any) -> None:
        forwards.append(1)
        if len(forwards) == 4:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**prompt, **GREEDY)
    handle.remove()
    assert torch.equal(model.generate(**prompt, **GREEDY), plain_of("weather_call"))


@pytest.mark.slow
def test_long_prompts_in_chunks(
    model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int], plain_of: Callable[[str], Tensor]
) -> None:
    """Chunks of a few tokens, and the last of one, are steps of their own."""
    prompt = prompt_of(demo_tokenizer, "weather_call")
    plain = plain_of("weather_call")
    for chunk in (7, 40, prompt["input_ids"].shape[1] - 1):
        del steps[:]
        assert torch.equal(model.generate(**prompt, **GREEDY, prefill_chunk_size=chunk), plain)
        assert steps


@pytest.mark.slow
def test_embeddings_as_a_prompt(model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int]) -> None:
    prompt = prompt_of(demo_tokenizer, "weather_call")
    embeds = model.get_input_embeddings()(prompt["input_ids"]).detach()
    plain = model.generate(inputs_embeds=embeds, **GREEDY, **PLAIN)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), plain)
    assert steps


@pytest.mark.parametrize("ahead", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_the_cache_grows(
    ahead: int,
    model: Any,
    demo_tokenizer: MistralLargeTokenizer,
    plain_of: Callable[[str], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(automatic, "ROOM_AHEAD", ahead)
    monkeypatch.setattr(decoding, "LEAST_SLOTS", 8)
    sizes: list[int] = []
    allocate = decoding.RecordedDecoding._allocate

    def kept(self: Any, slots: int) -> None:
        sizes.append(slots)
        allocate(self, slots)

    monkeypatch.setattr(decoding.RecordedDecoding, "_allocate", kept)
    prompt = prompt_of(demo_tokenizer, "weather_call")
    found = model.generate(**prompt, **GREEDY)
    assert torch.equal(found, plain_of("weather_call"))
    assert len(sizes) > 1
    assert sizes == sorted(sizes)
    assert sizes[-1] <= 1.25 * (found.shape[1] + decoding.MOST_ROWS) + 8


def test_sizes_of_caches() -> None:
    assert [decoding.slots_for(tokens) for tokens in (1, 256, 257, 1025, 5000, 131072)] == [
        256, 256, 512, 1280, 5120, 131072,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_cache_that_was_returned_stays(
    model: Any, demo_tokenizer: MistralLargeTokenizer, plain_of: Callable[[str], Tensor]
) -> None:
    """Whoever holds it goes on from it, whatever `generate` did meanwhile."""
    first, second = (prompt_of(demo_tokenizer, name) for name in ("weather_call", next(iter(GOLDEN))))
    whole = plain_of("weather_call")
    begun = model.generate(**first, **{**GREEDY, "max_new_tokens": 6}, return_dict_in_generate=True)
    cache: Any = cache_in(begun)
    assert type(cache) is RecordedCache
    of_layer: Any = cache.layers[1]
    keys = of_layer.keys.clone()
    # With recorded steps, and without them.
    for options in ({}, PLAIN):
        assert torch.equal(model.generate(**second, **GREEDY, **options), plain_of(next(iter(GOLDEN))))
    assert torch.equal(of_layer.keys, keys)
    assert torch.equal(model.generate(begun.sequences, **GREEDY, **cache_argument(cache)), whole)


@pytest.mark.slow
def test_a_cache_over_several_turns(
    model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int], plain_of: Callable[[str], Tensor]
) -> None:
    """Cropped, copied, emptied: as a DynamicCache."""
    prompt = prompt_of(demo_tokenizer, "weather_call")
    whole = plain_of("weather_call")
    cache: Any = RecordedCache(record_decoding(model, 64))
    for _ in range(2):
        assert torch.equal(model.generate(**prompt, **GREEDY, **cache_argument(cache)), whole)
        length = prompt["input_ids"].shape[1]
        assert cache.get_seq_length() == whole.shape[1] - 1
        cache.crop(length - 3 - cache.get_seq_length())
        assert [layer.keys.shape[2] for layer in cache.layers] == [length - 3] * 3
    other = copy.deepcopy(cache)
    cache.reset()
    assert (cache.get_seq_length(), other.get_seq_length()) == (0, length - 3)
    for each in (other, cache):
        assert torch.equal(model.generate(**prompt, **GREEDY, **cache_argument(each)), whole)
    assert steps
    with raises_exactly(ValueError, "crop(3): pass the number of tokens to remove as a negative number"):
        cache.crop(3)
    cache.crop(-10_000)
    assert cache.get_seq_length() == 0


def test_a_cache_that_does_not_fit_the_call_is_refused(tiny: Any, tiny_config: MistralLargeConfig) -> None:
    cache: Any = RecordedCache(record_decoding(tiny, 64))
    ids = random_ids(tiny_config, 2, 5)
    with raises_exactly(SettingError, "2 sequences: this RecordedCache is for 1; make one for 2, or pass none"):
        tiny.generate(ids, max_new_tokens=2, **cache_argument(cache))
    with (
        raises_exactly(SettingError, "2 sequences: this RecordedCache is for 1; make one for 2, or pass none"),
        torch.no_grad(),
    ):
        tiny(ids, **cache_argument(cache))
    with raises_exactly(
        SettingError, "a RecordedCache with beam_search: its sequences are fixed; pass another cache, or none"
    ):
        tiny.generate(ids[:1], max_new_tokens=2, num_beams=2, **cache_argument(cache))
    with raises_exactly(SettingError, "this RecordedCache is another model's; make one of this model, or pass none"):
        tiny_model(tiny_config).generate(ids[:1], max_new_tokens=2, **cache_argument(cache))
    with raises_exactly(
        SettingError,
        "the sequences of a RecordedCache are fixed: no beams, and nothing that repeats or selects sequences; pass "
        "another cache, or none",
    ):
        cache.reorder_cache(torch.tensor([0]))
    with raises_exactly(SettingError, "a RecordedCache carries no gradient; run the model under torch.no_grad()"):
        tiny(ids[:1], **cache_argument(cache))
    assert cache.get_seq_length() == 0


def test_forwards_that_a_step_does_not_compute(
    tiny: Any, tiny_config: MistralLargeConfig, steps: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Other positions, other masks, outputs of layers: the model reads the tokens itself, into the same cache."""
    ids = random_ids(tiny_config, 1, 12)
    padded, mask = left_padded(tiny_config, [8, 5])
    ones = torch.ones(2, 1, dtype=mask.dtype)
    hole = torch.cat((mask, ones), dim=-1)
    hole[0, 3] = 0
    last: dict[str, Any] = {"position_ids": torch.tensor([[7]])}
    each = torch.tensor([[8], [5]])
    cases: list[tuple[Tensor, Tensor | None, Tensor, dict[str, Any], int]] = [
        (ids[:, :7], None, ids[:, 7:8], {}, 1),
        (ids[:, :7], None, ids[:, 7:8], last, 1),
        (ids[:, :7], None, ids[:, 7:12], {}, 5),
        (ids[:, :7], None, ids[:, 7:8], {"position_ids": torch.tensor([[9]])}, 0),
        (ids[:, :7], None, ids[:, 7:8], {"output_hidden_states": True}, 0),
        (ids[:, :7], None, ids[:, 7:8], {"inputs_embeds": tiny.get_input_embeddings()(ids[:, 7:8]).detach()}, 0),
        (padded, mask, padded[:, :1], {"attention_mask": torch.cat((mask, ones), -1), "position_ids": each}, 1),
        (padded, mask, padded[:, :1], {"attention_mask": torch.cat((mask, ones), -1), "position_ids": each + 1}, 0),
        (padded, mask, padded[:, :1], {"attention_mask": torch.cat((mask, ones), -1)}, 0),
        (padded, mask, padded[:, :1], {"attention_mask": hole, "position_ids": each}, 0),
    ]
    for prompt, prompt_mask, following, options, taken in cases:
        caches: list[Any] = [RecordedCache(record_decoding(tiny, 32, len(prompt))), DynamicCache()]
        outputs = []
        for cache in caches:
            with torch.no_grad():
                positions = None if prompt_mask is None else (prompt_mask.cumsum(-1) - 1).clamp(min=0)
                tiny(prompt, attention_mask=prompt_mask, position_ids=positions, **cache_argument(cache))
                del steps[:]
                given = {} if "inputs_embeds" in options else {"input_ids": following}
                outputs.append(tiny(**given, **options, **cache_argument(cache)))
            assert bool(steps) == (bool(taken) and isinstance(cache, RecordedCache))
            assert cache.get_seq_length() == prompt.shape[1] + following.shape[1]
        found, expected = (output.logits.float() for output in outputs)
        assert found.shape == expected.shape
        assert (found - expected).norm() < 0.02 * expected.norm()


def test_no_steps_under_autocast_training_or_gradients(
    tiny: Any, tiny_config: MistralLargeConfig, steps: list[int]
) -> None:
    ids = random_ids(tiny_config, 1, 8)
    for context in (torch.enable_grad(), torch.autocast("cpu", torch.bfloat16)):
        cache = RecordedCache(record_decoding(tiny, 32))
        with torch.no_grad():
            tiny(ids, **cache_argument(cache))
            with context:
                if torch.is_grad_enabled():
                    with raises_exactly(
                        SettingError, "a RecordedCache carries no gradient; run the model under torch.no_grad()"
                    ):
                        tiny(ids[:, :1], **cache_argument(cache))
                else:
                    tiny(ids[:, :1], **cache_argument(cache))
    assert not steps
    with torch.no_grad():
        cache = RecordedCache(record_decoding(tiny, 32))
        tiny(ids, **cache_argument(cache))
        tiny.train()
        tiny(ids[:, :1], **cache_argument(cache))
    assert not steps


@pytest.mark.slow
def test_inference_mode_and_its_end(model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int]) -> None:
    prompt = prompt_of(demo_tokenizer, "weather_call")
    with torch.inference_mode():
        found = model.generate(**prompt, **GREEDY)
    assert torch.equal(model.generate(**prompt, **GREEDY), found)
    assert steps


def test_weights_that_moved_are_noticed(tiny: Any, tiny_config: MistralLargeConfig, steps: list[int]) -> None:
    ids = random_ids(tiny_config, 1, 8)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 384}
    cache = RecordedCache(record_decoding(tiny, 32))
    tiny.generate(ids, **settings)
    tiny.generate(ids, **settings, **cache_argument(cache))
    # In place, and as other tensors.
    for change in (lambda data: data.neg_(), lambda data: data.flip(0).clone()):
        weight = tiny.lm_head.weight
        weight.data = change(weight.data)
        found = tiny.generate(ids, **settings)
        cache.reset()
        of_cache = tiny.generate(ids, **settings, **cache_argument(cache))
        plain = tiny.generate(ids, **settings, **PLAIN)
        tiny.generate(ids, **settings)
        assert torch.equal(found, plain)
        assert torch.equal(of_cache, plain)
    assert steps


@pytest.mark.slow
def test_memory_is_released(tiny_config: MistralLargeConfig, steps: list[int]) -> None:
    ids = random_ids(tiny_config, 1, 8)
    made = tiny_model(tiny_config)
    made.generate(ids, max_new_tokens=3)
    kept = weakref.ref(automatic._kept[made])
    assert copy.deepcopy(made) not in automatic._kept
    release_recording(made)
    assert kept() is None
    made.generate(ids, max_new_tokens=3)
    kept, alive = weakref.ref(automatic._kept[made]), weakref.ref(made)
    del made
    gc.collect()
    assert (kept(), alive()) == (None, None)


@pytest.mark.slow
def test_several_threads(
    model: Any, demo_tokenizer: MistralLargeTokenizer, steps: list[int], plain_of: Callable[[str], Tensor]
) -> None:
    prompts = [prompt_of(demo_tokenizer, name) for name in [*GOLDEN][:3]]
    plain = [plain_of(name).tolist() for name in [*GOLDEN][:3]]
    found: list[Any] = [None] * len(prompts)

    def complete(place: int) -> None:
        found[place] = model.generate(**prompts[place], **GREEDY).tolist()

    threads = [threading.Thread(target=complete, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == plain
    assert steps


@pytest.fixture
def reasons(caplog: pytest.LogCaptureFixture) -> Any:
    """The log lines so far, each of which is said once."""
    obstacles.log_once.cache_clear()
    caplog.set_level(logging.DEBUG, "modeling_mistral_large")

    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "modeling_mistral_large"]

    return lines


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def adapted(model: Any) -> None:
    class Adapted(nn.Linear):
        pass

    model.model.layers[0].self_attn.q_proj.__class__ = Adapted


def in_nvfp4(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.q_proj = Nvfp4Linear(attention.q_proj.in_features, attention.q_proj.out_features)
    for tensor in attention.q_proj.parameters():
        tensor.fill_(1)


def of_another_class(model: Any) -> None:
    class Other(type(model.model.layers[2])):  # type: ignore[misc]
        pass

    model.model.layers[2].__class__ = Other


def with_another_forward(model: Any) -> None:
    layer = model.model.layers[0]
    layer.forward = layer.forward


FALLBACKS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "hooks": (hooked, {}, "model.layers.1.mlp has hooks, which a recorded step would skip"),
    "adapters": (
        adapted, {}, "model.layers.0.self_attn.q_proj is Adapted, not a BF16, FP8 or int4 linear layer without bias",
    ),
    "nvfp4": (
        in_nvfp4, {},
        "model.layers.0.self_attn.q_proj is Nvfp4Linear, not a BF16, FP8 or int4 linear layer without bias",
    ),
    "another class": (of_another_class, {}, "model.layers.2 is Other, whose forward may be another"),
    "another forward": (with_another_forward, {}, "model.layers.0 has a forward of its own, or a compiled one"),
    "dtype": (lambda model: model.float(), {}, "the model is in float32, not in bfloat16"),
    "fewer layers": (lambda model: setattr(model.config, "num_hidden_layers", 2), {}, "only 2 of the layers are run"),
    "switch of the model": (lambda model: setattr(model, "use_cuda_graph", False), {}, "switched off"),
    "beams": (None, {"num_beams": 2}, "beam_search is asked for"),
    "cache_implementation": (None, PLAIN, "cache_implementation is dynamic"),
    "no cache": (None, {"use_cache": False}, "use_cache is off"),
    "own cache": (None, cache_argument(DynamicCache()), "the call brings a cache of its own"),
    "sequences": (None, {"num_return_sequences": 17, "do_sample": True}, "more than 16 sequences"),
    "hidden states": (
        None, {"output_hidden_states": True, "return_dict_in_generate": True},
        "attentions or hidden states are asked for",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (number % 2)) for number, case in enumerate(FALLBACKS)],
)
def test_what_falls_back_and_why(
    case: str, tiny: Any, tiny_config: MistralLargeConfig, steps: list[int], reasons: Any
) -> None:
    change, options, reason = FALLBACKS[case]
    ids = random_ids(tiny_config, 1, 6)
    if change is not None:
        change(tiny)
    for _ in range(2):
        tiny.generate(ids, max_new_tokens=3, **options)
    assert not steps
    assert reasons() == [f"decoding without recorded steps: {reason}"]


def test_the_switch_of_the_environment(
    tiny: Any, tiny_config: MistralLargeConfig, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = random_ids(tiny_config, 1, 6)
    monkeypatch.setenv("MISTRAL_LARGE_USE_CUDA_GRAPH", "0")
    tiny.generate(ids, max_new_tokens=3)
    assert not steps
    monkeypatch.setenv("MISTRAL_LARGE_USE_CUDA_GRAPH", "1")
    tiny.generate(ids, max_new_tokens=3)
    assert steps
    assert tiny in automatic._kept
    # What is not recorded needs the memory for its own cache.
    tiny.generate(ids, max_new_tokens=3, **PLAIN)
    assert tiny not in automatic._kept


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("full"), "decoding without recorded steps: no memory for its cache"),
        (RuntimeError("x"), "decoding steps cannot be recorded (x); decoding without, which is slower"),
    ],
)
def test_a_step_that_cannot_be_recorded(
    error: Exception,
    line: str,
    tiny: Any,
    tiny_config: MistralLargeConfig,
    reasons: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    ids = random_ids(tiny_config, 1, 6)
    plain = tiny.generate(ids, max_new_tokens=3, **PLAIN)
    obstacles.log_once.cache_clear()
    monkeypatch.setattr(decoding.RecordedDecoding, "record", fail)
    assert torch.equal(tiny.generate(ids, max_new_tokens=3), plain)
    assert reasons()[-1] == line


@pytest.mark.slow
def test_pipeline(demo_folder: Path, steps: list[int]) -> None:
    chat: Any = pipeline(demo_folder, dtype="bfloat16")
    golden = GOLDEN["weather_call"]
    answer = chat(golden.messages, tools=golden.tools, max_new_tokens=96, do_sample=False)[0]["generated_text"][-1]
    assert answer["tool_calls"][0]["function"]["arguments"] == {"location": "Paris, France", "format": "celsius"}
    assert {*steps} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0, 1.2])
def test_chat_over_several_turns(
    temperature: float, demo_folder: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cache for all of it: the prefix that two prompts share is not read again."""

    def talk(expected: type) -> list[Any]:
        session = GenerationSession(
            str(demo_folder), Sampling(64, temperature, None, 5), device_map="cpu", kv="auto", prefill_chunk=512
        )
        assert isinstance(session.chat.cache, expected)
        messages = []
        for golden in [GOLDEN["window_cleaner_follow_up"], GOLDEN["weather_call"], GOLDEN["window_cleaner_follow_up"]]:
            messages.append(session.respond(golden.messages, [], lambda _: None))
        return messages

    found = talk(RecordedCache)
    assert steps
    monkeypatch.setenv("MISTRAL_LARGE_USE_CUDA_GRAPH", "0")
    assert found == talk(DynamicCache)


@pytest.mark.slow
@pytest.mark.parametrize("drafted", ["draft", "lookup"])
@pytest.mark.parametrize("name", ["weather_call", "window_cleaner_follow_up"])
def test_drafts_are_checked_by_one_step(
    drafted: str,
    name: str,
    model: Any,
    demo_tokenizer: MistralLargeTokenizer,
    steps: list[int],
    plain_of: Callable[[str], Tensor],
) -> None:
    """Greedy tokens are those of a plain call; several rows of one sequence are read by one step."""
    prompt = prompt_of(demo_tokenizer, name)
    plain = plain_of(name)
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 5}
    if drafted == "draft":
        draft = copy.deepcopy(model)
        with torch.no_grad():
            # Right often, not always.
            draft.model.layers[1].mlp.down_proj.weight.mul_(0.6)
        draft.generation_config.num_assistant_tokens = 5
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        options = {"assistant_model": draft}
    forwards: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, given: forwards.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    streamer = Kept()
    found = model.generate(**prompt, **GREEDY, **options, streamer=streamer)
    handle.remove()
    assert torch.equal(found, plain)
    assert streamer.ids == plain[0].tolist()
    # The prompt comes with the first draft; every other forward is a step of 1, 2, 4, 8 or 16 rows.
    assert len(forwards) < found.shape[1] - prompt["input_ids"].shape[1]
    rows = [1 << (tokens - 1).bit_length() for tokens in forwards[1:]]
    assert max(rows) > 1
    if drafted == "lookup":
        assert steps == rows
    else:
        assert {*rows} <= {*steps} <= {1, 2, *rows}
    # Again, after another call, and sampled of the seed.
    assert torch.equal(model.generate(**prompt, **GREEDY, **options), plain)


def test_more_tokens_than_a_step_takes(tiny: Any, tiny_config: MistralLargeConfig, steps: list[int]) -> None:
    """Several steps in turn, and beyond that the model itself."""
    ids = random_ids(tiny_config, 1, 60)
    for tokens, rows in ((16, [16]), (17, [16, 1]), (21, [16, 8]), (32, [16, 16]), (33, [])):
        cache = RecordedCache(record_decoding(tiny, 64))
        with torch.no_grad():
            tiny(ids[:, :9], **cache_argument(cache))
            del steps[:]
            found = tiny(ids[:, 9 : 9 + tokens], **cache_argument(cache)).logits.float()
            expected = tiny(ids[:, : 9 + tokens]).logits[:, 9:].float()
            assert steps == rows
            assert cache.get_seq_length() == 9 + tokens
            assert (found - expected).norm() < 0.02 * expected.norm()
            kept = tiny(ids[:, :2], **cache_argument(cache), logits_to_keep=1).logits
        assert kept.shape == (1, 1, 768)


@pytest.mark.slow
@pytest.mark.parametrize("drafted", ["draft", "lookup"])
def test_samples_with_drafts_have_the_distribution_of_the_model(
    drafted: str, tiny_config: MistralLargeConfig, steps: list[int]
) -> None:
    """Two tokens after a prompt, 600 times: a chi-square test against the exact probabilities of the model."""
    config = MistralLargeConfig(**{**tiny_config.to_dict(), "vocab_size": 400, "num_hidden_layers": 1})
    torch.manual_seed(0)
    target, draft = tiny_model(config), tiny_model(config)
    # The same head and embeddings, and some of the rest, so that drafts are right now and then.
    draft.load_state_dict(target.state_dict())
    with torch.no_grad():
        draft.model.layers[0].mlp.down_proj.weight.mul_(0.3)
    allowed = [7, 40, 90, 200]

    def only(_: int, __: Tensor) -> list[int]:
        return allowed

    prompt = torch.tensor([[1, 7, 40, 7, 40, 90, 7, 40]])
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2, "max_matching_ngram_size": 1}
    if drafted == "draft":
        draft.generation_config.num_assistant_tokens = 2
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": draft}
    with torch.no_grad():
        first = probabilities(target, prompt, allowed)
        both = torch.cat([
            first[place] * probabilities(target, torch.cat((prompt, torch.tensor([[token]])), -1), allowed)
            for place, token in enumerate(allowed)
        ])  # fmt: skip
    counts = torch.zeros(len(allowed) ** 2)
    count = 600
    for _ in range(count):
        found = target.generate(
            prompt, do_sample=True, top_k=0, temperature=1.0, max_new_tokens=3, eos_token_id=None, pad_token_id=384,
            prefix_allowed_tokens_fn=only, **options,
        )[0, 8:10].tolist()  # fmt: skip
        counts[allowed.index(found[0]) * len(allowed) + allowed.index(found[1])] += 1
    assert max(steps) > 1
    is_large = both * count >= 5
    expected = both[is_large] * count
    chi_square = float(((counts[is_large] - expected) ** 2 / expected).sum())
    # One of ten thousand random draws is beyond it.
    degrees = int(is_large.sum())
    assert degrees >= 6
    assert chi_square < degrees + 3.8 * (2 * degrees) ** 0.5 + 4
    assert 0.5 * float((counts / count - both).abs().sum()) < 0.1


def probabilities(model: Any, ids: Tensor, allowed: list[int]) -> Tensor:
    logits: Tensor = model(ids).logits[0, -1, allowed]
    return logits.float().softmax(-1)
