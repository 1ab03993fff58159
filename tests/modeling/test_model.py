"""The model against transformers' Mistral, bit for bit, and against the plain reference."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    MistralConfig,
    MistralForCausalLM,
    MistralForSequenceClassification,
)

from mistral_large_conversion import convert_checkpoint
from modeling_mistral_large import (
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeForQuestionAnswering,
    MistralLargeForSequenceClassification,
    MistralLargeForTokenClassification,
    MistralLargeModel,
)
from tests.support.checkpoints import write_consolidated
from tests.support.errors import raises_exactly
from tests.support.models import (
    ATTENTION,
    GREEDY,
    left_padded,
    ours_only,
    random_ids,
    randomize,
    stock_and_ours,
    stock_config,
)
from tests.support.reference_model import reference_logits


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("attention", ATTENTION)
def test_logits_equal_stock_mistral_bit_for_bit(
    tiny_config: MistralLargeConfig, attention: str, dtype: torch.dtype
) -> None:
    stock, ours = stock_and_ours(tiny_config, attention, dtype)
    ids, mask = left_padded(tiny_config, [37, 12, 1])
    with torch.no_grad():
        assert torch.equal(ours(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits)
        assert torch.equal(ours(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("attention", ATTENTION)
def test_loss_and_every_gradient_equal_stock_mistral(tiny_config: MistralLargeConfig, attention: str) -> None:
    stock, ours = stock_and_ours(tiny_config, attention)
    ids = random_ids(tiny_config, 2, 19)
    labels = ids.clone()
    labels[:, :5] = -100
    losses = [model(ids, labels=labels).loss for model in (stock, ours)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
def test_converted_random_weights_give_the_plain_references_logits(
    tiny_config: MistralLargeConfig, attention: str, tmp_path: Path
) -> None:
    tiny_config.vocab_size = 32768  # one row for each piece of the real tokenizer
    params, weights = write_consolidated(tmp_path / "consolidated", tiny_config)
    model = convert_and_load(tmp_path, attention)
    ids = random_ids(tiny_config, 2, 41)
    with torch.no_grad():
        logits = model(ids).logits
    for row in range(2):
        assert (logits[row] - reference_logits(weights, params, ids[row])).abs().max() <= 1e-5


def convert_and_load(folder: Path, attention: str) -> Any:
    convert_checkpoint(folder / "consolidated", folder / "hf")
    return AutoModelForCausalLM.from_pretrained(
        folder / "hf", dtype=torch.float32, attn_implementation=attention
    ).eval()


def test_state_dict_keys_are_those_of_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "eager")
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in stock.state_dict().items()
    }


def test_the_defaults_are_the_123b(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = MistralLargeForCausalLM(MistralLargeConfig())
    parameters = dict(model.named_parameters())
    assert len(parameters) == 795
    assert 2 * sum(parameter.numel() for parameter in parameters.values()) == 245_220_139_008
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}
    assert model.config.max_position_embeddings == 131072


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention on the CPU is compiled with g++")
def test_sdpa_and_flex_attention_agree_with_eager(tiny_config: MistralLargeConfig) -> None:
    ids, mask = left_padded(tiny_config, [37, 12])
    logits = {}
    weights = None
    for attention in (*ATTENTION, "flex_attention"):
        model = ours_only(tiny_config, attention)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        with torch.no_grad():
            logits[attention] = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=0, atol=2e-5)
    torch.testing.assert_close(logits["flex_attention"], logits["eager"], rtol=0, atol=2e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention runs on CUDA devices only")
def test_flash_attention_agrees_with_sdpa(tiny_config: MistralLargeConfig) -> None:
    pytest.importorskip("flash_attn", reason="needs the flash-attn wheel")
    ids, mask = left_padded(tiny_config, [37, 12])
    model = ours_only(tiny_config, "sdpa").to("cuda", torch.bfloat16)
    expected = model(ids.cuda(), attention_mask=mask.cuda()).logits[mask.bool()]
    model.set_attn_implementation("flash_attention_2")
    found = model(ids.cuda(), attention_mask=mask.cuda()).logits[mask.bool()]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


def test_flash_attention_is_declared() -> None:
    assert MistralLargeForCausalLM._supports_flash_attn
    assert MistralLargeForCausalLM._supports_attention_backend


def test_logits_to_keep_by_number_and_by_position(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 2, 11)
    with torch.no_grad():
        whole = model(ids).logits
        for kept, expected in ((1, whole[:, -1:]), (4, whole[:, -4:]), (torch.tensor([0, 5]), whole[:, [0, 5]])):
            # Another number of rows may take another matrix kernel, hence the last bits.
            torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, expected, rtol=0, atol=1e-6)


def test_generate_asks_for_the_last_positions_logits_only(
    tiny_config: MistralLargeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ours_only(tiny_config)
    widths = []
    head = model.lm_head.forward

    def counting_head(hidden: Tensor) -> Any:
        widths.append(hidden.shape[1])
        return head(hidden)

    monkeypatch.setattr(model.lm_head, "forward", counting_head)
    model.generate(random_ids(tiny_config, 2, 31), **GREEDY)
    assert widths == [1] * GREEDY["max_new_tokens"]


def test_hidden_states_and_attentions_equal_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "eager")
    ids = random_ids(tiny_config, 2, 11)
    with torch.no_grad():
        expected, found = (model(ids, output_hidden_states=True, output_attentions=True) for model in (stock, ours))
    assert len(found.hidden_states) == tiny_config.num_hidden_layers + 1
    assert len(found.attentions) == tiny_config.num_hidden_layers
    for kind in ("hidden_states", "attentions"):
        for mine, theirs in zip(found[kind], expected[kind], strict=True):
            assert torch.equal(mine, theirs)


def test_embeddings_go_in_place_of_ids_but_not_with_them(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 2, 11)
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    with raises_exactly(ValueError, "MistralLargeModel.forward: pass exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=embedded)
    with raises_exactly(ValueError, "MistralLargeModel.forward: pass exactly one of input_ids and inputs_embeds"):
        model()


def test_return_dict_false_gives_a_tuple(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 5)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)


def test_auto_classes_build_ours(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    tiny_config.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MistralLargeConfig
    for auto_class, model_class in {
        AutoModel: MistralLargeModel,
        AutoModelForCausalLM: MistralLargeForCausalLM,
        AutoModelForQuestionAnswering: MistralLargeForQuestionAnswering,
        AutoModelForSequenceClassification: MistralLargeForSequenceClassification,
        AutoModelForTokenClassification: MistralLargeForTokenClassification,
    }.items():
        model = auto_class.from_config(config)
        assert type(model) is model_class
        base = model if model_class is MistralLargeModel else model.model
        assert type(base) is MistralLargeModel


def test_stock_mistral_is_left_alone(tiny_config: MistralLargeConfig) -> None:
    config = stock_config(tiny_config)
    assert type(AutoModelForCausalLM.from_config(config)) is MistralForCausalLM
    assert type(AutoConfig.for_model("mistral")) is MistralConfig


def test_sequence_scores_equal_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    tiny_config.num_labels = 3
    stock = MistralForSequenceClassification._from_config(stock_config(tiny_config)).eval()
    randomize(stock)
    ours = MistralLargeForSequenceClassification._from_config(tiny_config).eval()
    ours.load_state_dict(stock.state_dict())
    ids, mask = left_padded(tiny_config, [9, 4])
    with torch.no_grad():
        assert torch.equal(ours(ids, attention_mask=mask).logits, stock(ids, attention_mask=mask).logits)


def test_token_and_answer_scores_have_their_shapes(tiny_config: MistralLargeConfig) -> None:
    tiny_config.num_labels = 3
    ids = random_ids(tiny_config, 2, 7)
    assert MistralLargeForTokenClassification(tiny_config)(ids).logits.shape == (2, 7, 3)
    assert MistralLargeForQuestionAnswering(tiny_config)(ids).start_logits.shape == (2, 7)
