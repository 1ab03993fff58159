"""One package owns the host: names of the cache and keywords in every version, and no underscore of it elsewhere."""

import ast
import inspect
from collections import namedtuple
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, DynamicCache, GenerationMixin, MistralForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.base import HfQuantizer

from mistral_large_conversion.errors import MistralLargeError
from modeling_mistral_large import (
    MistralLargeConfig,
    MistralLargeForCausalLM,
    MistralLargeForQuestionAnswering,
    MistralLargeForSequenceClassification,
    MistralLargeForTokenClassification,
    MistralLargeModel,
)
from modeling_mistral_large.errors import KeywordError
from modeling_mistral_large.transformers_api.keywords import CACHE_NAME, CACHE_NAMES, cache_argument, cache_in
from tests.support.errors import raises_exactly, whole
from tests.support.models import GREEDY, ours_only, random_ids, stock_and_ours

ROOT = Path(__file__).parents[2]
OWNER = "modeling_mistral_large/transformers_api/"
ROOMS = ("modeling_mistral_large", "mistral_large_conversion", "mistral_large_cli")
CLASSES = [
    MistralLargeModel,
    MistralLargeForCausalLM,
    MistralLargeForSequenceClassification,
    MistralLargeForTokenClassification,
    MistralLargeForQuestionAnswering,
]
HEADED = CLASSES[1:]
IS_RENAMED = CACHE_NAME == "cache"
every_class = pytest.mark.parametrize("model_class", CLASSES)


def build(model_class: Any, config: MistralLargeConfig, **options: Any) -> Any:
    return model_class._from_config(config, **options).eval()


# The cache


def test_the_name_of_the_cache_is_that_of_stock_mistral() -> None:
    parameters = inspect.signature(MistralForCausalLM.forward).parameters
    assert [name for name in CACHE_NAMES if name in parameters] == [CACHE_NAME]


@every_class
def test_tools_see_the_arguments_of_stock_mistral(model_class: Any) -> None:
    stock = getattr(transformers, model_class.__name__.replace("MistralLarge", "Mistral"))
    assert list(inspect.signature(model_class.forward).parameters) == list(inspect.signature(stock.forward).parameters)


@every_class
@pytest.mark.parametrize("name", CACHE_NAMES if IS_RENAMED else ["past_key_values"])
def test_the_cache_is_used_under_every_name_that_stock_takes(
    tiny_config: MistralLargeConfig, model_class: Any, name: str
) -> None:
    tiny_config.pad_token_id = 0
    model, ids = build(model_class, tiny_config), random_ids(tiny_config, 1, 9)
    cache = DynamicCache(config=tiny_config)
    with torch.no_grad():
        model(ids[:, :6], **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == 6
        found = model(ids[:, 6:], **{name: cache}, use_cache=True)
        assert cache.get_seq_length() == 9
        if model_class is MistralLargeForCausalLM:
            torch.testing.assert_close(found.logits, model(ids).logits[:, 6:], rtol=0, atol=2e-5)


def test_the_outputs_have_the_cache_by_the_name_of_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, 1, 5)
    for found, expected in ((ours(ids), stock(ids)), (ours.model(ids), stock.model(ids))):
        assert list(found.keys()) == list(expected.keys())
        assert CACHE_NAME in found
        assert cache_in(found).get_seq_length() == 5
    without = ours(ids, use_cache=False)
    assert CACHE_NAME not in without
    assert cache_in(without) is None


@pytest.mark.skipif(IS_RENAMED, reason="this transformers takes both names")
@every_class
def test_the_new_name_is_refused_where_transformers_does_not_use_it(
    tiny_config: MistralLargeConfig, model_class: Any
) -> None:
    problem = (
        f"{model_class.__name__}.forward() got an unexpected keyword argument 'cache'; transformers <*> calls the "
        "cache 'past_key_values'"
    )
    with pytest.raises(KeywordError, match=whole(problem)):
        build(model_class, tiny_config)(random_ids(tiny_config, 1, 3), cache=DynamicCache(config=tiny_config))


@every_class
def test_two_caches_are_refused(tiny_config: MistralLargeConfig, model_class: Any) -> None:
    caches = {name: DynamicCache(config=tiny_config) for name in CACHE_NAMES}
    problem = (
        "got both 'cache' and 'past_key_values', which are one argument; pass one"
        if IS_RENAMED
        else "got an unexpected keyword argument 'cache'; transformers <*> calls the cache 'past_key_values'"
    )
    with pytest.raises(KeywordError, match=whole(f"{model_class.__name__}.forward() {problem}")):
        build(model_class, tiny_config)(random_ids(tiny_config, 1, 3), **caches)


@pytest.mark.skipif(not IS_RENAMED, reason="this transformers takes one name")
def test_a_layer_takes_either_name(tiny_config: MistralLargeConfig) -> None:
    model = ours_only(tiny_config).model
    hidden, positions = torch.randn(1, 3, tiny_config.hidden_size), torch.arange(3).unsqueeze(0)
    angles = model.rotary_emb(hidden, positions)
    for name in CACHE_NAMES:
        cache = DynamicCache(config=tiny_config)
        model.layers[0](hidden, position_embeddings=angles, **{name: cache})
        assert cache.get_seq_length() == 3
    with raises_exactly(
        KeywordError,
        "MistralLargeAttention.forward() got both 'cache' and 'past_key_values', which are one argument; pass one",
    ):
        model.layers[0](hidden, position_embeddings=angles, cache=cache, past_key_values=cache)


def test_generate_takes_a_cache_and_goes_on_from_it(tiny_config: MistralLargeConfig) -> None:
    model, ids = ours_only(tiny_config), random_ids(tiny_config, 1, 9)
    cache = DynamicCache(config=tiny_config)
    written = model.generate(ids, **cache_argument(cache), **GREEDY)
    assert torch.equal(written, model.generate(ids, use_cache=False, **GREEDY))
    assert cache.get_seq_length() == written.shape[1] - 1
    more = model.generate(written, **cache_argument(cache), **GREEDY)
    assert torch.equal(more, model.generate(written, use_cache=False, **GREEDY))


# Keywords


@pytest.mark.slow
@every_class
@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("attention_maks", "did you mean 'attention_mask'?"),
        ("output_attention", "did you mean 'output_attentions'?"),
        ("past_key_value", "did you mean 'past_key_values'?"),
        # What is close to it is up to the attention options of each version.
        ("read_index", "<*>"),
        ("softcapp", "<*>"),
        ("pixel_values", "<*>"),
    ],
)
def test_an_unknown_keyword_is_named(tiny_config: MistralLargeConfig, model_class: Any, name: str, advice: str) -> None:
    problem = f"{model_class.__name__}.forward() got an unexpected keyword argument {name!r}; {advice}"
    with pytest.raises(TypeError, match=whole(problem)) as error:
        build(model_class, tiny_config)(random_ids(tiny_config, 1, 3), **{name: None})
    assert isinstance(error.value, MistralLargeError)


@pytest.mark.parametrize("model_class", HEADED)
def test_misspelt_labels_are_named(tiny_config: MistralLargeConfig, model_class: Any) -> None:
    advice = "did you mean 'labels'?"
    if model_class is MistralLargeForQuestionAnswering:
        advice = "it would have no effect; leave it out"
    problem = f"{model_class.__name__}.forward() got an unexpected keyword argument 'labls'; {advice}"
    with raises_exactly(KeywordError, problem):
        build(model_class, tiny_config)(random_ids(tiny_config, 1, 3), labls=torch.ones(1, 3))


def test_the_decoder_takes_no_labels(tiny_config: MistralLargeConfig) -> None:
    with raises_exactly(
        TypeError,
        "MistralLargeModel.forward() got an unexpected keyword argument 'labels'; did you mean 'shift_labels'?",
    ):
        build(MistralLargeModel, tiny_config)(random_ids(tiny_config, 1, 3), labels=torch.ones(1, 3))


@every_class
def test_the_keywords_that_transformers_declares_are_taken(tiny_config: MistralLargeConfig, model_class: Any) -> None:
    tiny_config.pad_token_id = 0
    model, ids = build(model_class, tiny_config, attn_implementation="eager"), random_ids(tiny_config, 1, 3)
    declared = {
        "output_attentions": True,
        "output_hidden_states": True,
        "output_router_logits": False,
        "num_items_in_batch": None,
        "cu_seq_lens_q": None,
        "max_length_k": None,
        "seq_idx": None,
        "is_causal": True,
        "shift_labels": None,
        "ignore_index": -100,
    }
    outputs = model(ids, return_dict=True, **declared)
    assert len(outputs.attentions) == tiny_config.num_hidden_layers
    assert isinstance(model(ids, return_dict=False), tuple)


def test_options_of_the_loss_are_those_of_stock_mistral(tiny_config: MistralLargeConfig) -> None:
    stock, ours = stock_and_ours(tiny_config, "sdpa")
    ids = random_ids(tiny_config, 2, 7)
    shifted = ids.roll(-1, 1)
    for options in (
        {"num_items_in_batch": torch.tensor(5)},
        {"shift_labels": shifted},
        {"ignore_index": int(ids[0, 3])},
    ):
        assert torch.equal(ours(ids, labels=ids, **options).loss, stock(ids, labels=ids, **options).loss)


def with_steps(module: nn.Module, *arguments: Any, steps: Any = None, **options: Any) -> Any:
    """An attention with an option of its own, as vLLM's has `attention_instances`."""
    if steps is not None:
        steps.append(options["scaling"])
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *arguments, **options)


def test_a_registered_attention_may_have_options(tiny_config: MistralLargeConfig) -> None:
    AttentionInterface.register("with_steps", with_steps)
    ids = random_ids(tiny_config, 1, 3)
    model = build(MistralLargeForCausalLM, tiny_config, attn_implementation="with_steps")
    steps: list[float] = []
    model(ids, steps=steps)
    assert steps == [tiny_config.head_dim**-0.5] * tiny_config.num_hidden_layers
    with raises_exactly(
        TypeError,
        "MistralLargeForCausalLM.forward() got an unexpected keyword argument 'stepps'; it would have no effect; "
        "leave it out",
    ):
        model(ids, stepps=steps)
    with raises_exactly(
        TypeError,
        "MistralLargeForCausalLM.forward() got an unexpected keyword argument 'steps'; it would have no effect; "
        "leave it out",
    ):
        build(MistralLargeForCausalLM, tiny_config, attn_implementation="sdpa")(ids, steps=steps)


def test_generate_refuses_what_forward_refuses(tiny_config: MistralLargeConfig) -> None:
    model, ids = ours_only(tiny_config), random_ids(tiny_config, 1, 3)
    for name in ("attention_maks", "max_new_token", *(() if IS_RENAMED else ("cache",))):
        with pytest.raises((TypeError, ValueError), match=name):
            model.generate(ids, **{name: 1}, **GREEDY)


@pytest.fixture
def _fresh_compiler() -> None:
    """What other tests have compiled of the same code counts for the limit of recompilations."""
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@every_class
def test_forward_compiles_into_one_graph(tiny_config: MistralLargeConfig, model_class: Any) -> None:
    # Each layer is traced anew, and all are alike.
    tiny_config.pad_token_id, tiny_config.num_hidden_layers = 0, 1
    model, ids = build(model_class, tiny_config), random_ids(tiny_config, 1, 5)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(
            compiled(ids, use_cache=False, num_items_in_batch=None, return_dict=True)[0],
            model(ids, use_cache=False)[0],
        )


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_compiled_model_takes_the_options_of_its_attention_and_no_others(tiny_config: MistralLargeConfig) -> None:
    tiny_config.num_hidden_layers = 1
    model, ids = build(MistralLargeForCausalLM, tiny_config), random_ids(tiny_config, 1, 5)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, position_bias=None, use_cache=False).logits, model(ids).logits)
        with pytest.raises(Exception, match="unexpected keyword argument 'labls'"):
            compiled(ids, labls=None, use_cache=False)


# Who touches the host


def sources() -> Iterator[tuple[str, ast.Module]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            if not name.startswith(OWNER):
                yield name, ast.parse(path.read_text())


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def own_privates(tree: ast.Module) -> set[str]:
    """Underscored names that a module itself makes: functions, classes, variables, attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


@cache
def others_privates() -> set[str]:
    """Underscored names of torch's modules and of Python's named tuples, whose interface they are."""
    return {*dir(nn.Module()), *dir(namedtuple("Any", []))}


@cache
def host_privates() -> set[str]:
    """Underscored names of the classes that the package's classes and objects come from, but not torch's."""
    hosts = [PreTrainedModel, GenerationMixin, transformers.PreTrainedConfig, transformers.PreTrainedTokenizerFast]
    hosts += [HfQuantizer, transformers.Pipeline, transformers.Cache]
    names = {name for host in hosts for name in dir(host) if is_private(name)}
    # Set on objects only.
    names |= {"_attn_implementation", "_commit_hash", "_mask_length", "_tp_size", "_hf_hook", "_from_auto"}
    return names - others_privates()


def is_torchs(node: ast.Attribute) -> bool:
    """Whether it is a function of torch's, such as torch._scaled_mm and those of torch.ops.aten."""
    return ast.unparse(node.value).split(".")[0] in ("torch", "aten")


def touches(name: str, tree: ast.Module, own: set[str], host: set[str]) -> Iterator[str]:
    """Each touch with its place; `own` are the underscored names that the whole package makes."""
    own_here, others = own_privates(tree), others_privates()
    for node in ast.walk(tree):
        where = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "packaging"):
            if node.module == "packaging.version" or (node.module, [each.name for each in node.names]) == (
                "packaging",
                ["version"],
            ):
                yield f"{where} compares versions by packaging"
            for each in node.names:
                if each.name == "__version__" or is_private(each.name):
                    yield f"{where} imports {each.name} of {node.module}"
        elif isinstance(node, ast.Attribute):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr == "__version__" and of == "transformers":
                yield f"{where} reads transformers.__version__"
            elif (
                is_private(node.attr)
                and node.attr not in (own_here if of == "self" else own) | others
                and not is_torchs(node)
            ):
                yield f"{where} touches .{node.attr}"
            elif node.attr in host and ast.unparse(node.value) == "super()":
                yield f"{where} touches super().{node.attr}"
        elif isinstance(node, ast.ClassDef) and node.bases:
            for statement in node.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else []
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                names += [statement.name] if isinstance(statement, ast.FunctionDef) else []
                yield from (f"{name}:{statement.lineno} overrides {one}" for one in names if one in host)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr"):
            key = node.args[1]
            if isinstance(key, ast.Constant) and key.value in host:
                yield f"{where} touches .{key.value}"


@pytest.mark.slow
def test_no_other_module_tests_a_version_or_touches_an_underscore_of_transformers() -> None:
    trees = dict(sources())
    assert len(trees) > 50
    own, host = set().union(*map(own_privates, trees.values())), host_privates()
    found = [touch for name, tree in trees.items() for touch in touches(name, tree, own, host)]
    assert found == [], f"these belong into {OWNER}"


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("from transformers import __version__", 1),
        ("import transformers\nif transformers.__version__ > '5.20': pass", 1),
        ("from packaging.version import Version", 1),
        ("from packaging import version", 1),
        ("from transformers.masking_utils import _is_torch_xpu", 1),
        ("model._tp_plan", 1),
        ("getattr(config, '_mask_length', None)", 1),
        ("class A(B):\n    def _prefill(self): pass", 1),
        ("class A(B):\n    _no_split_modules = ['x']", 1),
        ("x._unheard_of()", 1),
        ("torch._scaled_mm()", 0),
        ("pair._replace(first=1)", 0),
        ("module._forward_hooks", 0),
        ("other._own_thing", 0),
        ("self._own_thing", 1),
        ("class A:\n    def f(self): self._x = 1\n    def g(self): return self._x", 0),
        ("class A(B):\n    def f(self): return super()._decode()", 1),
        ("class A:\n    def _decode(self): pass", 0),
    ],
)
def test_the_count_sees_what_it_counts(source: str, count: int) -> None:
    assert len(list(touches("file", ast.parse(source), {"_own_thing"}, host_privates()))) == count


def test_every_hook_says_what_breaks() -> None:
    """Each public function and class of the package has a docstring."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / OWNER).glob("*.py")]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = [node for node in nodes if not is_private(node.name)]
    assert len(public) > 20
    assert [node.name for node in public if not ast.get_docstring(node)] == []
