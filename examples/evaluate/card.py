"""What the model card of Mistral-Large-Instruct-2407 publishes, and a command for each score.

    python examples/evaluate/card.py [MODEL]

prints the commands. MODEL: a converted folder or repository. What the card does not say is in `unknown`.
"""

import sys
from dataclasses import dataclass
from typing import Literal, TypeAlias

Tool: TypeAlias = Literal["lm-eval", "evalplus", "FastChat", "arena-hard-auto", "WildBench"]

NO_PROMPTS = "number of examples, prompts"
BASE = "measured on the base model, which is not published; number of examples, prompts"
BASE_TRANSLATED = "measured on the base model, which is not published; whose translation, number of examples, prompts"
JUDGE = "the judge's version, temperature, system prompt"


@dataclass(frozen=True)
class Recipe:
    """One score of the card.

    score: as published; percent, except for MT Bench (1 to 10).
    task: in lm-eval its task, elsewhere the data set's name there.
    shots: examples in the prompt, our choice where the card is silent; None leaves the tool's own.
    is_chat: asked in the chat format; base models are not.
    unknown: what the card leaves out and a comparison depends on.
    """

    benchmark: str
    score: float
    tool: Tool
    task: str
    shots: int | None = None
    is_chat: bool = True
    unknown: str = NO_PROMPTS


# Global-MMLU has all ten of the card's languages.
MMLU_LANGUAGES = {
    "French": ("fr", 82.8),
    "German": ("de", 81.6),
    "Spanish": ("es", 82.7),
    "Italian": ("it", 82.7),
    "Dutch": ("nl", 80.7),
    "Portuguese": ("pt", 81.6),
    "Russian": ("ru", 79.0),
    "Korean": ("ko", 60.1),
    "Japanese": ("ja", 78.8),
    "Chinese": ("zh", 74.8),
}

RECIPES = (
    Recipe("MMLU", 84.0, "lm-eval", "mmlu", shots=5, is_chat=False, unknown=BASE),
    *(
        Recipe(
            f"MMLU {language}",
            score,
            "lm-eval",
            f"global_mmlu_full_{code}",
            shots=5,
            is_chat=False,
            unknown=BASE_TRANSLATED,
        )
        for language, (code, score) in MMLU_LANGUAGES.items()
    ),
    Recipe("MT Bench", 8.63, "FastChat", "mt_bench", unknown=JUDGE),
    Recipe("Wild Bench", 56.3, "WildBench", "v2", unknown=f"{JUDGE}, which of its scores"),
    Recipe("Arena Hard", 73.2, "arena-hard-auto", "v0.1", unknown=f"{JUDGE}, with or without style control"),
    Recipe("Human Eval", 92.0, "lm-eval", "humaneval_instruct", shots=0, unknown="prompts, how code is extracted"),
    Recipe("Human Eval Plus", 87.0, "evalplus", "humaneval", shots=0, unknown="version of the data, prompts"),
    Recipe("MBPP Base", 80.0, "evalplus", "mbpp", shots=0, unknown="version of the data (378 or 399 tasks), prompts"),
    Recipe("MBPP Plus", 69.0, "evalplus", "mbpp", shots=0, unknown="version of the data (378 or 399 tasks), prompts"),
    Recipe("GSM8K", 93.0, "lm-eval", "gsm8k_cot", shots=8),
    Recipe(
        "Math Instruct (0-shot, no CoT)",
        70.0,
        "lm-eval",
        "hendrycks_math",
        shots=0,
        unknown="prompts, how answers are compared",
    ),
    Recipe(
        "Math Instruct (0-shot, CoT)",
        71.5,
        "lm-eval",
        "minerva_math",
        shots=0,
        unknown="prompts, how answers are compared",
    ),
)

# Code that the model wrote is run to score it: in a container.
RUNS_ANSWERS = ("humaneval_instruct",)

# Tools that ask an OpenAI-compatible server, `mistral-large serve MODEL`; the name of the model there is MODEL.
SERVER = "http://127.0.0.1:8000/v1"
SERVED = {
    "evalplus": (
        f"evalplus.evaluate --model {{model}} --dataset {{task}} --backend openai --base-url {SERVER} --greedy",
    ),
    "FastChat": (
        f"python gen_api_answer.py --model {{model}} --openai-api-base {SERVER}",
        "python gen_judgment.py --model-list {model}",
        "python show_result.py --model-list {model}",
    ),
    # The server's address goes into config/api_config.yaml, and the model's name into the other two files there.
    "arena-hard-auto": ("python gen_answer.py", "python gen_judgment.py", "python show_result.py"),
    # Loads the model with vLLM by itself.
    "WildBench": (
        "bash scripts/_common_vllm.sh {model} {model} 8",
        "bash evaluation/run_score_eval_batch.sh {model}",
        "bash leaderboard/show_eval.sh score_only",
    ),
}


def commands(recipe: Recipe, model: str) -> list[str]:
    """The command lines that measure a score: of lm-eval from this repository, of others from theirs."""
    if recipe.tool != "lm-eval":
        return [command.format(model=model, task=recipe.task) for command in SERVED[recipe.tool]]
    words = [
        "python examples/evaluate/evaluate.py --model mistral-large",
        f"--model_args pretrained={model},dtype=bfloat16,parallelize=True",
        f"--tasks {recipe.task}",
        "--batch_size 8",
    ]
    if recipe.shots is not None:
        words.append(f"--num_fewshot {recipe.shots}")
    if recipe.is_chat:
        words.append("--apply_chat_template")
    if recipe.task in RUNS_ANSWERS:
        words = ["HF_ALLOW_CODE_EVAL=1", *words, "--confirm_run_unsafe_code"]
    return [" ".join(words)]


def main(model: str = "Mistral-Large-2407-hf") -> None:
    for recipe in RECIPES:
        print(f"# {recipe.benchmark}: {recipe.score:g} published, with {recipe.tool}; not known: {recipe.unknown}")
        print(*commands(recipe, model), sep="\n", end="\n\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
