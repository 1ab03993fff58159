"""What each of two ranks of a tensor-parallel load does: `torchrun -m tests.support.tensor_parallel FOLDER RESULT`.

The first rank saves the logits of the prompt and the greedy tokens to RESULT; a refused load saves the error's message.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers.distributed.configuration_utils import DistributedConfig

from modeling_mistral_large import MistralLargeForCausalLM
from tests.support.models import GREEDY

PROMPT = [[1, 3, 6312, 28709, 1526, 4, 1200]]


def main(folder: str, result: str) -> None:
    torch.distributed.init_process_group("gloo")
    ranks = torch.distributed.get_world_size()
    found: dict[str, Any]
    try:
        model: Any = MistralLargeForCausalLM.from_pretrained(
            folder, dtype=torch.float32, distributed_config=DistributedConfig(tp_size=ranks)
        )
    except ValueError as error:
        found = {"error": str(error)}
    else:
        prompt = torch.tensor(PROMPT)
        with torch.no_grad():
            logits = model(prompt).logits
        # Codes of quantized weights are there as the plain tensors that their kernel takes.
        weight = next(model.model.layers[0].self_attn.k_proj.parameters())
        rows = (weight.to_local() if isinstance(weight, DTensor) else weight).shape[0]
        found = {"logits": logits, "tokens": model.generate(prompt, **GREEDY), "key_rows": rows}
    if torch.distributed.get_rank() == 0:
        torch.save(found, Path(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
