"""What each of two ranks does: `torchrun -m tests.support.streamed_ranks RESULT FOLDER ...`.

Both load their shards of each folder as transformers reads them, and streamed; the first rank saves to RESULT, for each
folder and rank, whether all tensors are the same, how many bytes were streamed to it, and how many it has.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_mistral_large import MistralLargeForCausalLM, streamed_weights


def shards(folder: str) -> dict[str, Tensor]:
    ranks = DistributedConfig(tp_size=torch.distributed.get_world_size())
    model: Any = MistralLargeForCausalLM.from_pretrained(folder, distributed_config=ranks)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.to_local() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def main(result: str, *folders: str) -> None:
    torch.distributed.init_process_group("gloo")
    streamed: list[int] = []
    load = streamed_weights.Staging.load

    def counted(self: Any, *arguments: Any) -> Tensor:
        loaded = load(self, *arguments)
        streamed.append(loaded.nbytes)
        return loaded

    expected = [shards(folder) for folder in folders]
    streamed_weights.Staging.load = counted  # type: ignore[method-assign,assignment]  # as monkeypatch does
    streamed_weights.STREAMED_DEVICES.add("cpu")
    # Small ones, so that each tensor takes several.
    streamed_weights.BUFFER_BYTES = 40_000
    found = []
    for folder, tensors in zip(folders, expected, strict=True):
        streamed.clear()
        others = shards(folder)
        same = others.keys() == tensors.keys() and all(
            others[name].dtype is value.dtype and torch.equal(others[name], value) for name, value in tensors.items()
        )
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        own_bytes = sum(tensor.nbytes for name, tensor in others.items() if "inv_freq" not in name)
        torch.distributed.all_gather_object(everywhere, (same, sum(streamed), own_bytes))
        found.append(everywhere)
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
