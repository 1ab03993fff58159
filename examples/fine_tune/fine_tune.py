"""Teach the model new tools: LoRA with TRL, loss on what the assistant says, and back to the vendor's layout.

    python examples/fine_tune/fine_tune.py MODEL DATA OUTPUT

MODEL: a folder or repository, as the vendor publishes it or converted.
DATA: JSON lines of `{"messages": […], "tools": […]}` in OpenAI's format.
OUTPUT: a new folder; OUTPUT/adapter is what was learned, for PEFT, and OUTPUT/merged the whole model, consolidated.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from mistral_large_conversion import export_checkpoint
from modeling_mistral_large import MistralLargeForCausalLM, MistralLargeTokenizer
from modeling_mistral_large.errors import ConversationError

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The rows of words: a model that never saw a word of the data has to learn these, too.
WORDS = ["embed_tokens", "lm_head"]
NO_LOSS = -100


def encode(tokenizer: MistralLargeTokenizer, conversation: dict[str, Any]) -> dict[str, list[int]]:
    """The ids of a conversation, and as labels those of what the assistant says: texts, tool calls and each `</s>`."""
    encoding = tokenizer.apply_chat_template(
        conversation["messages"], tools=conversation.get("tools"), return_assistant_tokens_mask=True
    )
    ids, mask = encoding["input_ids"], encoding["assistant_masks"]
    return {
        "input_ids": ids,
        "labels": [token if is_generated else NO_LOSS for token, is_generated in zip(ids, mask, strict=True)],
    }


def load_data(path: Path, tokenizer: MistralLargeTokenizer, max_length: int) -> Dataset:
    """Encode the conversations of a file.

    Encoded here because columns of a dataset have one type: it would give every call the arguments of all the others.
    One that is longer than `max_length` ends the program, as cutting it would take away what is to be learned.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = encode(tokenizer, json.loads(line))
        except (ValueError, KeyError, ConversationError) as error:
            sys.exit(f"{path}:{number}: {error}")
        if len(row["input_ids"]) > max_length:
            sys.exit(f"{path}:{number}: {len(row['input_ids'])} tokens; set --max-length, or split the conversation")
        rows.append(row)
    return Dataset.from_list(rows)


def train(
    model: MistralLargeForCausalLM, tokenizer: MistralLargeTokenizer, data: Dataset, arguments: argparse.Namespace
) -> Any:
    """Train an adapter, save it, and return the model with it: PEFT's."""
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules=PROJECTIONS,
        modules_to_save=WORDS if arguments.train_words else None,
    )
    is_on_gpu = model.device.type == "cuda"
    settings = SFTConfig(
        output_dir=str(arguments.output / "adapter"),
        max_steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 20),
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.accumulate,
        # None of it is cut; see load_data.
        max_length=None,
        bf16=is_on_gpu,
        gradient_checkpointing=is_on_gpu,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
    )
    trainer = SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    trainer.train()
    trainer.save_model()
    return trainer.model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach Mistral Large new tools.")
    parser.add_argument("model", help="folder or repository, consolidated or converted")
    parser.add_argument("data", type=Path, help="JSON lines of messages and tools")
    parser.add_argument("output", type=Path, help="new folder for the adapter and the merged model")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA matrices (%(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="at its highest (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of the optimizer (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, help="conversations at once (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=8, help="batches for a step (%(default)s)")
    parser.add_argument("--max-length", type=int, default=8192, help="tokens of a conversation (%(default)s)")
    parser.add_argument("--train-words", action="store_true", help="train the rows of the vocabulary, too")
    parser.add_argument("--seed", type=int, default=2407)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.output.exists():
        sys.exit(f"{arguments.output}: is there already; name a new folder")
    tokenizer = MistralLargeTokenizer.from_pretrained(arguments.model)
    data = load_data(arguments.data, tokenizer, arguments.max_length)
    model = MistralLargeForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32, device_map="auto"
    )
    merged = train(model, tokenizer, data, arguments).merge_and_unload()
    export_checkpoint(merged, arguments.output / "merged", origin=arguments.model, dtype="bf16")
    print(f"mistral-large chat {arguments.output / 'merged'}")


if __name__ == "__main__":
    main()
