"""Training and files: gradients, adapters, saving, loading, offloading, compiling."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    ContinuousBatchingConfig,
    GenerationConfig,
    MistralForCausalLM,
    StaticCache,
)

from modeling_mistral_large import MistralLargeConfig, MistralLargeForCausalLM
from tests.support.models import ATTENTION, GREEDY, ours_only, random_ids, stock_and_ours, stock_config


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_config: MistralLargeConfig, reentrant: bool) -> None:
    model = ours_only(tiny_config).train()
    ids = random_ids(tiny_config, 2, 11)
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    if reentrant:
        model.enable_input_require_grads()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-6, msg=name)


def test_lora_attaches_and_trains_only_itself(tiny_config: MistralLargeConfig) -> None:
    model = get_peft_model(ours_only(tiny_config), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    ids = random_ids(tiny_config, 2, 11)
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    # Seven projections a layer, two matrices each; "all-linear" leaves the head alone.
    assert len(trained) == 3 * 7 * 2
    assert all("lora_" in name for name in trained)


def test_attention_dropout_acts_in_training_only(tiny_config: MistralLargeConfig) -> None:
    tiny_config.attention_dropout = 0.5
    ids = random_ids(tiny_config, 1, 11)
    for attention in ATTENTION:
        model = ours_only(tiny_config, attention)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, model(ids).logits)
            model.train()
            assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_save_and_load_is_bit_exact(tiny_config: MistralLargeConfig, tmp_path: Path, dtype: torch.dtype) -> None:
    model = ours_only(tiny_config).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="200kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    for loaded in (
        MistralLargeForCausalLM.from_pretrained(tmp_path),
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto"),
    ):
        assert type(loaded) is MistralLargeForCausalLM
        assert loaded.dtype is dtype
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name
        assert loaded.config.to_diff_dict() == MistralLargeConfig.from_pretrained(tmp_path).to_diff_dict()


def test_rope_survives_loading_from_the_meta_device(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    model = ours_only(tiny_config)
    model.save_pretrained(tmp_path)
    loaded = MistralLargeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.rotary_emb.inv_freq.dtype is torch.float32
    assert torch.equal(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_stock_mistral_reads_our_weights_and_we_read_stock_weights(
    tiny_config: MistralLargeConfig, tmp_path: Path
) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    from_stock = MistralLargeForCausalLM.from_pretrained(tmp_path / "stock", config=tiny_config)
    from_ours = MistralForCausalLM.from_pretrained(tmp_path / "ours", config=stock_config(tiny_config))
    for name, tensor in stock.state_dict().items():
        assert torch.equal(from_stock.state_dict()[name], tensor), name
        assert torch.equal(from_ours.state_dict()[name], tensor), name


def test_cpu_and_disk_offload_give_the_same_logits(tiny_config: MistralLargeConfig, tmp_path: Path) -> None:
    model = ours_only(tiny_config)
    model.save_pretrained(tmp_path / "model", max_shard_size="200kB")
    ids = random_ids(tiny_config, 1, 11)
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    layers = [f"model.layers.{layer}" for layer in range(3)]
    device_map = dict.fromkeys(names, "cpu") | {layers[0]: "cpu"} | dict.fromkeys(layers[1:], "disk")
    offloaded = MistralLargeForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[2].mlp.up_proj.weight.is_meta
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_decoding_compiles_into_one_graph(tiny_config: MistralLargeConfig) -> None:
    # Each layer is traced anew; two are enough to see that each has its own part of the cache.
    tiny_config.num_hidden_layers = 2
    model = ours_only(tiny_config)
    ids = random_ids(tiny_config, 1, 9)
    # The "eager" backend proves that tracing finds no graph break; what a real backend makes of it is torch's matter.
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        past, compiled_past = (StaticCache(tiny_config, max_cache_len=16) for _ in range(2))
        model(ids[:, :8], past_key_values=past)
        model(ids[:, :8], past_key_values=compiled_past)
        position = torch.tensor([[8]])
        expected = model(ids[:, 8:], past_key_values=past, position_ids=position).logits
        found = compiled(ids[:, 8:], past_key_values=compiled_past, position_ids=position).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_continuous_batching_gives_the_greedy_tokens(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    prompts = [random_ids(tiny_config, 1, length)[0].tolist() for length in (5, 17, 9)]
    expected = [model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :].tolist() for prompt in prompts]
    answers = model.generate_batch(
        inputs=prompts,
        generation_config=GenerationConfig(**{**GREEDY, "eos_token_id": -1}),
        # Without a limit the paged cache takes most of the memory there is.
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, block_size=16, max_batch_tokens=64),
    )
    assert [answer.generated_tokens for answer in answers.values()] == expected


def test_what_a_quantizer_adds_to_the_plan_of_a_config_is_not_in_others(tiny_config: MistralLargeConfig) -> None:
    plan = dict(MistralLargeConfig().base_model_tp_plan)
    tiny_config.base_model_tp_plan["layers.*.mlp.experts"] = "colwise"
    assert MistralLargeConfig().base_model_tp_plan == plan
    assert "base_model_tp_plan" not in tiny_config.to_dict()


def test_plans_name_modules_that_exist(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config)
    modules = {name for name, _ in model.named_modules()}
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._no_split_modules) <= classes
    for pattern in tiny_config.base_model_tp_plan:
        assert {"model." + pattern.replace("*", str(layer)) for layer in range(3)} <= modules, pattern
    assert {"model." + name for name in tiny_config.base_model_pp_plan} <= modules
    assert set(model._tp_plan) >= {"lm_head"}
