"""Folders as people have them: the vendor's, the hub cache's, ours, fine-tunes; all with the demo checkpoint's weights.

Each builder writes a folder that does not exist yet and returns it. The vocabularies are the vendor's own files, from
the wheel of mistral-common; the stock tokenizer.json is transformers' own conversion of them. Names and rows of the
weights are mapped here, without the package's help.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import tokenizer_model_file

Vocabulary = Literal["v3", "v7"]
REPOSITORY = "mistralai/Mistral-Large-Instruct-2407"
COMMIT = "5c9ce5b5f7a7ad62d03e8c66c719b66d586de26b"

# An older template of v3, without tools, as fine-tunes of 2024 carry it; its prompts are v3's where there are none.
OLDER_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# The same for 2411's: a system block in place, no tools.
OLDER_TEMPLATE_V7 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '[SYSTEM_PROMPT] ' + message['content'] + '[/SYSTEM_PROMPT]' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
OLDER_TEMPLATES: dict[str, str] = {"v3": OLDER_TEMPLATE, "v7": OLDER_TEMPLATE_V7}
# Of a fine-tune on another format, whose markers are tokens that were added.
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHER_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def demo_checkpoint() -> Path:
    """The bundled demo checkpoint, which has no tokenizer."""
    spec = find_spec("mistral_large_cli")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "demo_checkpoint")


def demo_params() -> dict[str, Any]:
    params: dict[str, Any] = json.loads((demo_checkpoint() / "params.json").read_text())
    return params


@lru_cache(maxsize=1)
def demo_weights() -> dict[str, Tensor]:
    """The demo's tensors under their consolidated names, bf16."""
    return {
        name: tensor
        for file in sorted(demo_checkpoint().glob("consolidated*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@lru_cache(maxsize=1)
def hf_demo_weights() -> dict[str, Tensor]:
    """The demo's tensors in the HF layout: names, and q and k rows x0 x1 … y0 y1 … per head."""
    head_dim = demo_params()["head_dim"]
    found = {}
    for name, tensor in demo_weights().items():
        if name in _OTHER_NAMES:
            found[_OTHER_NAMES[name]] = tensor
            continue
        _, layer, rest = name.split(".", 2)
        module = rest.removesuffix(".weight")
        if module in ("attention.wq", "attention.wk"):
            heads = tensor.shape[0] // head_dim
            tensor = tensor.view(heads, head_dim // 2, 2, -1).transpose(1, 2).reshape(tensor.shape).contiguous()
        found[f"model.layers.{layer}.{_LAYER_NAMES[module]}.weight"] = tensor
    return found


def hf_config(*, of_2024: bool = False, **changes: Any) -> dict[str, Any]:
    """The demo's config.json of type `mistral`, as transformers writes it today or wrote it in 2024.

    That of 2024 has no `head_dim`, which is hidden_size / num_attention_heads only in `square_weights`.
    """
    params = demo_params()
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": params["head_dim"],
        "hidden_act": "silu",
        "hidden_size": params["dim"],
        "initializer_range": 0.02,
        "intermediate_size": params["hidden_dim"],
        "max_position_embeddings": params["max_position_embeddings"],
        "model_type": "mistral",
        "num_attention_heads": params["n_heads"],
        "num_hidden_layers": params["n_layers"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.2",
        "use_cache": True,
        "vocab_size": params["vocab_size"],
    }
    if of_2024:
        del config["head_dim"]
    return {**config, **changes}


def square_weights(heads: int = 2, kv_heads: int = 2) -> dict[str, Tensor]:
    """The demo's weights with as many query rows as `hidden_size`: those of the first heads; it answers nothing.

    A config of 2024 has no `head_dim`; the geometry of 2407 allows that, as 96 heads of 128 make 12288.
    """
    rows, kv_rows = (count * demo_params()["head_dim"] for count in (heads, kv_heads))
    cut = {"q_proj": (rows, 0), "k_proj": (kv_rows, 0), "v_proj": (kv_rows, 0), "o_proj": (rows, 1)}
    return {
        name: tensor.narrow(cut[part][1], 0, cut[part][0]).contiguous()
        if (part := name.split(".")[-2]) in cut
        else tensor
        for name, tensor in hf_demo_weights().items()
    }


# What the config of `square_weights` says.
SQUARE = {"num_attention_heads": 2, "num_key_value_heads": 2}


@lru_cache(maxsize=2)
def _stock_tokenizer(vocabulary: Vocabulary) -> Any:
    """transformers' Llama tokenizer of the vendor's file, which is copied before tokens are added."""
    from transformers import LlamaTokenizer

    with TemporaryDirectory() as name:
        shutil.copyfile(tokenizer_model_file(vocabulary), Path(name, "tokenizer.model"))
        return LlamaTokenizer.from_pretrained(name, legacy=False, add_bos_token=True)


@lru_cache(maxsize=4)
def _saved_stock_tokenizer(vocabulary: Vocabulary, added: tuple[str, ...]) -> tuple[bytes, str]:
    """The tokenizer.json and tokenizer_config.json that transformers saves."""
    tokenizer = _stock_tokenizer(vocabulary)
    if added:
        tokenizer = deepcopy(tokenizer)
        tokenizer.add_tokens(list(added), special_tokens=True)
    with TemporaryDirectory() as name:
        tokenizer.save_pretrained(name)
        return Path(name, "tokenizer.json").read_bytes(), Path(name, "tokenizer_config.json").read_text()


def stock_tokenizer_files(
    vocabulary: Vocabulary = "v3", added: tuple[str, ...] = (), template: str | None = None
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json as transformers' Llama tokenizer makes them of the vendor's file.

    added: tokens that a fine-tune has added, as special ones.
    """
    tokenizer_json, settings = _saved_stock_tokenizer(vocabulary, added)
    config = json.loads(settings)
    # As of 2024: the template is in the config, and transformers' version of today has left no trace.
    for key in ("extra_special_tokens", "backend", "is_local"):
        config.pop(key, None)
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config["chat_template"] = OLDER_TEMPLATES[vocabulary] if template is None else template
    return {"tokenizer.json": tokenizer_json, "tokenizer_config.json": json.dumps(config, indent=2).encode()}


def write_weights(
    folder: Path, weights: dict[str, Tensor], *, stem: str = "model", shards: int = 2, has_index: bool = True
) -> None:
    """Write tensors in the order of their names into one file or several, these with an index."""
    names = sorted(weights)
    files: dict[str, str] = {}
    for shard in range(shards):
        name = f"{stem}.safetensors" if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {tensor: weights[tensor].contiguous() for tensor in names[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(part, name)
    if shards > 1 and has_index:
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write_hf_half(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], *, shards: int = 2, stem: str = "model"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True, **ids}))
    write_weights(folder, weights, shards=shards, stem=stem)


def vendor(folder: Path, vocabulary: Vocabulary = "v3") -> Path:
    """The vendor's download as its card says: params.json, consolidated-*, the SentencePiece file."""
    folder.mkdir(parents=True)
    for file in demo_checkpoint().iterdir():
        if file.name.startswith(("params", "consolidated", "LICENSE")):
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(tokenizer_model_file(vocabulary), folder / f"tokenizer.model.{vocabulary}")
    return folder


def vendor_whole(folder: Path, vocabulary: Vocabulary = "v3") -> Path:
    """The vendor's repository, whole: both layouts, config.json of type `mistral`, the Llama tokenizer."""
    vendor(folder, vocabulary)
    return vendor_hf_half(folder, vocabulary)


def vendor_hf_half(folder: Path, vocabulary: Vocabulary = "v3") -> Path:
    """What of the vendor's repository `from_pretrained` downloads, as files of a folder, old or new."""
    _write_hf_half(folder, hf_config(), hf_demo_weights())
    for name, content in stock_tokenizer_files(vocabulary).items():
        (folder / name).write_bytes(content)
    shutil.copyfile(tokenizer_model_file(vocabulary), folder / "tokenizer.model")
    return folder


def into_hub_cache(
    source: Path, cache: Path, repository: str = REPOSITORY, names: Sequence[str] | None = None, commit: str = COMMIT
) -> Path:
    """Put files of a folder into a hub cache as its client does, links to blobs, and return the snapshot's folder.

    names: all files without it.
    """
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for file in sorted(source.iterdir()):
        if names is not None and file.name not in names:
            continue
        content = file.read_bytes()
        blob = root / "blobs" / sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


def hub_cache(cache: Path, vocabulary: Vocabulary = "v3", repository: str = REPOSITORY) -> Path:
    """A hub cache with the HF half of the vendor's repository; returns the snapshot's folder.

    Without tokenizer.model, which transformers does not ask for where there is a tokenizer.json.
    """
    with TemporaryDirectory() as name:
        half = vendor_hf_half(Path(name) / "half", vocabulary)
        (half / "tokenizer.model").unlink()
        return into_hub_cache(half, cache, repository)


def ours(folder: Path, vocabulary: Vocabulary = "v3") -> Path:
    """What `mistral-large convert` writes of the vendor's folder."""
    from mistral_large_conversion import convert_checkpoint

    with TemporaryDirectory() as name:
        convert_checkpoint(vendor(Path(name) / "vendor", vocabulary), folder)
    return folder


def fine_tune(
    folder: Path,
    vocabulary: Vocabulary = "v3",
    *,
    tokenizer: Literal["json", "model", "both"] = "json",
    added: tuple[str, ...] = (),
    template: str | None = None,
    config: dict[str, Any] | None = None,
    weights: dict[str, Tensor] | None = None,
    shards: int = 2,
) -> Path:
    """A fine-tune of type `mistral`.

    tokenizer: transformers' own tokenizer.json alone, the vendor's file under the name tokenizer.model, or both.
    added: tokens that were added; embedding and output have rows of zeros for them.
    template: its own chat template, or None for an older one of the vocabulary's format.
    config, weights: others than the demo's.
    """
    weights = dict(hf_demo_weights() if weights is None else weights)
    config = dict(hf_config() if config is None else config)
    if added:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = torch.zeros(len(added), weights[name].shape[1], dtype=weights[name].dtype)
            weights[name] = torch.cat([weights[name], rows])
        config["vocab_size"] += len(added)
    _write_hf_half(folder, config, weights, shards=shards)
    files = stock_tokenizer_files(vocabulary, added, template)
    if tokenizer == "model":
        files = {name: content for name, content in files.items() if name != "tokenizer.json"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if tokenizer != "json":
        shutil.copyfile(tokenizer_model_file(vocabulary), folder / "tokenizer.model")
    return folder


def fine_tune_of_2024(folder: Path, vocabulary: Vocabulary = "v3") -> Path:
    """A fine-tune with `tokenizer.json` alone from transformers' own conversion and a config without `head_dim`."""
    return fine_tune(folder, vocabulary, config=hf_config(of_2024=True, **SQUARE), weights=square_weights())


def fine_tune_with_model_file(folder: Path, vocabulary: Vocabulary = "v3") -> Path:
    """A fine-tune with the vendor's vocabulary as an unversioned `tokenizer.model`, and no tokenizer.json."""
    return fine_tune(folder, vocabulary, tokenizer="model")


# The six kinds of folders of the table in docs/loading.md; `hub_cache` returns a folder inside of the one it is given.
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "vendor": vendor,
    "vendor_whole": vendor_whole,
    "hub_cache": hub_cache,
    "ours": ours,
    "fine_tune_of_2024": fine_tune_of_2024,
    "fine_tune_with_model_file": fine_tune_with_model_file,
}
# Those whose weights are the demo's, unchanged: its golden responses are theirs.
GOLDEN_FOLDERS = tuple(name for name in FOLDERS if name != "fine_tune_of_2024")
