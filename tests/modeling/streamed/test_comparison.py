"""A comparison by layers is that of two whole models; the oracle is transformers' Mistral, in float64 statistics."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralForCausalLM

from mistral_large_conversion import convert_checkpoint
from mistral_large_conversion.checkpoint import open_checkpoint
from mistral_large_conversion.errors import CheckpointError, SettingError
from mistral_large_conversion.samples import Sample
from modeling_mistral_large import MistralLargeConfig
from modeling_mistral_large.streamed import (
    LayerStream,
    TokenSequence,
    activations,
    compare_checkpoints,
    compare_streams,
    comparison,
    layer_stream,
)
from modeling_mistral_large.streamed.divergence import RunningSoftmax
from tests.support import folders
from tests.support.errors import raises_exactly, whole
from tests.support.models import random_ids, randomize, stock_and_ours, stock_config

CONVERSATIONS = [
    Sample(
        "a line",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "I am a toy model."},
        ],
    ),
    Sample("another", text="Les documents sont là. " * 15),
]


@torch.no_grad()
def whole_model_evaluation(reference: Any, candidate: Any, sequences: list[TokenSequence]) -> dict[str, Any]:
    """The same of two whole models, written as the definitions are."""
    kl, agrees, losses, by_sequence = [], [], ([], []), []  # type: ignore[var-annotated]  # lists of tensors
    size = reference.config.vocab_size
    are_alike = reference.config.num_hidden_layers == candidate.config.num_hidden_layers
    errors = torch.zeros(reference.config.num_hidden_layers if are_alike else 0, 2, dtype=torch.float64)
    for sequence in sequences:
        ids = torch.tensor([sequence.ids])
        outputs = [model(ids) for model in (reference, candidate)]
        targets = [place for place, is_scored in enumerate(sequence.is_scored) if is_scored]
        log_p, log_q = (output.logits[0].double().log_softmax(-1) for output in outputs)
        per_token = [(log_p[place - 1].exp() * (log_p[place - 1] - log_q[place - 1, :size])).sum() for place in targets]
        kl += per_token
        by_sequence += [torch.stack(per_token)] if per_token else []
        agrees += [bool(log_p[place - 1].argmax() == log_q[place - 1].argmax()) for place in targets]
        for log, losses_of_model in zip((log_p, log_q), losses, strict=True):
            losses_of_model.extend(-log[place - 1, sequence.ids[place]] for place in targets)
        if are_alike:
            errors += torch.tensor(norms_of_hidden(reference, candidate, ids), dtype=torch.float64)
    values = torch.stack(kl)
    ordered, place = values.sort().values, 0.99 * (len(values) - 1)
    low = math.floor(place)
    spread = sum(float((group - values.mean()).sum()) ** 2 for group in by_sequence)
    groups = len(by_sequence)
    return {
        "kl_mean": values.mean().item(),
        "kl_p99": (ordered[low] + (place - low) * (ordered[min(low + 1, len(values) - 1)] - ordered[low])).item(),
        "top1_agreement": sum(agrees) / len(agrees),
        "flips_per_10k": 10_000 * agrees.count(False) / len(agrees),
        "perplexity_reference": math.exp(sum(losses[0]) / len(agrees)),
        "perplexity_candidate": math.exp(sum(losses[1]) / len(agrees)),
        "tokens": len(agrees),
        "kl_standard_error": math.sqrt(spread * groups / (groups - 1)) / len(values) if groups > 1 else None,
        "hidden_errors": (errors[:, 0] / errors[:, 1]).sqrt().tolist(),
    }


def norms_of_hidden(reference: Any, candidate: Any, ids: Tensor) -> list[list[float]]:
    """Squared norms of difference and of the reference after each layer; the last is before the final norm."""
    states = []
    for model in (reference, candidate):
        kept: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(
                lambda _, __, output, kept=kept: kept.append(output if isinstance(output, Tensor) else output[0])
            )
            for layer in model.model.layers
        ]
        model(ids)
        for hook in hooks:
            hook.remove()
        states.append(kept)
    return [
        [float((two - one).double().pow(2).sum()), float(one.double().pow(2).sum())]
        for one, two in zip(*states, strict=True)
    ]


def assert_same(found: Any, wanted: dict[str, Any]) -> None:
    assert list(asdict(found)) == list(wanted)
    for name, value in asdict(found).items():
        assert value == (wanted[name] if value is None else pytest.approx(wanted[name], rel=1e-6, abs=1e-6)), name


def random_sequences(config: MistralLargeConfig, lengths: list[int]) -> list[TokenSequence]:
    """Sequences of which some tokens are scored, and of one of them none."""
    made = []
    for number, length in enumerate(lengths):
        marks = (torch.rand(length) < 0.6).tolist() if number else [False] * length
        made.append(TokenSequence(tuple(random_ids(config, 1, length)[0].tolist()), (False, *marks[1:])))
    made[-1] = replace(made[-1], is_scored=(False, *[True] * (lengths[-1] - 1)))
    return made


def saved(model: Any, folder: Path) -> LayerStream:
    model.save_pretrained(folder)
    return LayerStream(open_checkpoint(folder))


def disturbed(model: Any, strength: float = 0.04) -> Any:
    """A stock model with other weights close to those of `model`."""
    other = MistralForCausalLM(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * strength)
    return other


@pytest.mark.parametrize("goes_to_disk", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_comparison_is_that_of_whole_models(
    tiny_config: MistralLargeConfig, goes_to_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks of both kinds, the last of them not full.
    monkeypatch.setattr(layer_stream, "HEAD_ROWS", 100)
    monkeypatch.setattr(comparison, "TOKENS_AT_ONCE", 30)
    monkeypatch.setattr(activations, "BYTES_IN_MEMORY", 0 if goes_to_disk else 10**9)
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    other = disturbed(stock)
    sequences = random_sequences(tiny_config, [5, 2, 31, 8, 40])
    wanted = whole_model_evaluation(stock, other, sequences)
    assert 1e-3 < wanted["kl_mean"] < wanted["kl_p99"]
    assert 0 < wanted["flips_per_10k"] < 10_000
    assert_same(compare_streams(saved(stock, tmp_path / "a"), saved(other, tmp_path / "b"), sequences), wanted)


@pytest.mark.slow
def test_a_single_sequence_has_no_standard_error(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    other = disturbed(stock)
    sequences = random_sequences(tiny_config, [4, 20])
    wanted = whole_model_evaluation(stock, other, sequences)
    assert wanted["kl_standard_error"] is None
    assert_same(compare_streams(saved(stock, tmp_path / "a"), saved(other, tmp_path / "b"), sequences), wanted)


def test_a_model_is_no_different_from_itself(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    streams = saved(stock, tmp_path / "a"), LayerStream(open_checkpoint(tmp_path / "a"))
    found = compare_streams(*streams, random_sequences(tiny_config, [3, 20]))
    assert (found.kl_mean, found.kl_p99, found.top1_agreement, found.flips_per_10k) == (0, 0, 1, 0)
    assert found.perplexity_reference == found.perplexity_candidate
    assert found.hidden_errors == (0, 0, 0)


def test_progress_is_the_bytes_of_all_layers(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stream = saved(stock, tmp_path)
    told: list[int] = []
    compare_streams(stream, stream, random_sequences(tiny_config, [3, 4]), progress=told.append)
    of_layer = sum(parameter.nbytes for parameter in stock.model.layers[0].parameters())
    assert told == [of_layer] * 6
    assert 2 * stream.layer_bytes() == sum(told)


def test_models_of_other_depth_and_width_are_compared(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    config = stock_config(tiny_config)
    config.num_hidden_layers, config.hidden_size = 2, 48
    # Its last rows are pieces that the reference does not have.
    config.vocab_size = 800
    small = MistralForCausalLM(config).eval()
    randomize(small)
    sequences = random_sequences(tiny_config, [3, 25])
    wanted = whole_model_evaluation(stock, small, sequences)
    assert wanted["hidden_errors"] == []
    assert_same(compare_streams(saved(stock, tmp_path / "a"), saved(small, tmp_path / "b"), sequences), wanted)


@pytest.mark.slow
def test_logits_that_are_not_finite_are_an_error(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    broken = disturbed(stock)
    with torch.no_grad():
        broken.lm_head.weight[700] = math.inf
    streams = saved(stock, tmp_path / "a"), saved(broken, tmp_path / "b")
    sequences = random_sequences(tiny_config, [3, 4])
    message = (
        f"{tmp_path / 'b'}: its logits are not finite in float32; nothing can be said of such predictions; pass dtype "
        "float32, or verify the checkpoint"
    )
    with raises_exactly(SettingError, message):
        compare_streams(*streams, sequences)
    with raises_exactly(SettingError, message):
        compare_streams(streams[1], streams[0], sequences)


def test_what_cannot_be_scored_is_refused(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    tiny_config.max_position_embeddings = 16
    stock, _ = stock_and_ours(tiny_config, "sdpa")
    stream = saved(stock, tmp_path)
    with raises_exactly(
        SettingError,
        "no token is scored: conversations without assistant tokens in the first tokens that are kept; raise length, "
        "or score all tokens",
    ):
        compare_streams(stream, stream, [TokenSequence((5, 6), (False, False))])
    with raises_exactly(
        SettingError,
        f"length 17: {tmp_path} has a context of 16 tokens; a sequence fits into it; pass a smaller length",
    ):
        compare_streams(stream, stream, [TokenSequence((5,) * 17, (False, *[True] * 16))])


# Folders


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.vendor(tmp_path_factory.mktemp("demo") / "vendor")


@pytest.mark.slow
@pytest.mark.usefixtures("remembered_tokenizer")
@pytest.mark.parametrize("scheme", ["fp8", "int4", "nvfp4"])
def test_a_quantized_folder_is_compared_as_it_runs(scheme: Any, demo: Path, tmp_path: Path) -> None:
    from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
    from modeling_mistral_large.streamed import tokenize_samples

    convert_checkpoint(demo, tmp_path / scheme, quantize=scheme)
    stock = stock_demo()
    candidate: Any = MistralLargeForCausalLM.from_pretrained(tmp_path / scheme, dtype=torch.float32).eval()
    sequences = tokenize_samples(CONVERSATIONS, MistralLargeTokenizer.from_pretrained(demo))
    wanted = whole_model_evaluation(stock, candidate, sequences)
    assert wanted["kl_mean"] > 1e-3
    assert_same(compare_checkpoints(demo, tmp_path / scheme, CONVERSATIONS, dtype=torch.float32), wanted)


def stock_demo() -> Any:
    """transformers' Mistral with the demo's weights in float32."""
    from transformers import MistralConfig

    config = folders.hf_config()
    stock = MistralForCausalLM._from_config(MistralConfig(**config), dtype=torch.float32).eval()
    stock.load_state_dict({name: tensor.float() for name, tensor in folders.hf_demo_weights().items()})
    return stock


@pytest.mark.slow
@pytest.mark.usefixtures("remembered_tokenizer")
@pytest.mark.parametrize("kind", ["vendor_whole", "hub_cache", "ours", "fine_tune_with_model_file", "v7"])
def test_the_same_weights_in_another_folder_are_no_different(kind: str, demo: Path, tmp_path: Path) -> None:
    folder = folders.vendor(tmp_path / "v7", "v7") if kind == "v7" else folders.FOLDERS[kind](tmp_path / "folder")
    found = compare_checkpoints(demo, folder, CONVERSATIONS)
    assert (found.kl_mean, found.flips_per_10k, set(found.hidden_errors)) == (0, 0, {0})
    assert found.tokens > 80


@pytest.mark.slow
def test_a_fine_tune_may_have_more_tokens_than_its_base(demo: Path, tmp_path: Path) -> None:
    tuned = folders.fine_tune(tmp_path / "tuned", added=folders.CHATML_TOKENS)
    found = compare_checkpoints(demo, tuned, CONVERSATIONS, dtype=torch.float32)
    # Two logits of 0 more: they take their part of the probability and nothing else.
    assert 0 < found.kl_mean < 0.01
    with raises_exactly(
        CheckpointError,
        f"{demo}: 32768 tokens, {tuned} has 32770; models are compared over one vocabulary, and only the candidate may "
        "have more; exchange the two, or compare it with the checkpoint it was made of",
    ):
        compare_checkpoints(tuned, demo, CONVERSATIONS)


@pytest.mark.slow
def test_control_tokens_of_the_text_must_mean_the_same(demo: Path, tmp_path: Path) -> None:
    of_v7 = folders.vendor(tmp_path / "v7", "v7")
    with raises_exactly(
        CheckpointError,
        f"{demo}: token 16 is '[control_14]', that of {of_v7} is '[SYSTEM_PROMPT]'; models are compared over one "
        "vocabulary; compare it with the checkpoint it was made of",
    ):
        compare_checkpoints(of_v7, demo, CONVERSATIONS)


@pytest.mark.slow
def test_another_vocabulary_is_refused(demo: Path, tmp_path: Path) -> None:
    other = folders.fine_tune(tmp_path / "other")
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["▁the"], vocab["▁a"] = vocab["▁a"], vocab["▁the"]
    path.write_text(json.dumps(tokenizer))
    the, a = vocab["▁a"], vocab["▁the"]
    first, pieces = min(the, a), {the: "▁the", a: "▁a"}
    swapped = {the: "▁a", a: "▁the"}
    foreign = (
        f"{other}: the vocabulary is none of the vendor's ({path}: other pieces than v3's for text), so the "
        "tokenizer is transformers' own <*>: its ids are those of its own program, control strings that a user writes "
        "become control tokens, and tool calls are not parsed"
    )
    with (
        pytest.warns(UserWarning, match=whole(foreign)),
        raises_exactly(
            CheckpointError,
            f"{other}: token {first} is {swapped[first]!r}, that of {demo} is {pieces[first]!r}; models are compared "
            "over one vocabulary; compare it with the checkpoint it was made of",
        ),
    ):
        compare_checkpoints(demo, other, [Sample("a text", text="Nothing of it is here.")])


@pytest.mark.parametrize("step", [1, 3, 7, 50])
def test_a_running_softmax_is_that_of_all_logits_at_once(step: int) -> None:
    # Of few values, so that many are the largest, as bf16 has them; and one that is far from zero.
    logits = torch.randint(-2, 2, (40, 50)).double() + 900 * torch.arange(40)[:, None]
    targets = torch.randint(0, 50, (40,))
    found = RunningSoftmax(targets)
    for start in range(0, 50, step):
        found.add(start, logits[:, start : start + step])
    assert torch.equal(found.most_likely, logits.argmax(-1))
    torch.testing.assert_close(found.log_sums(), logits.logsumexp(-1), rtol=1e-14, atol=0)
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(found.losses(), wanted, rtol=0, atol=1e-10)
