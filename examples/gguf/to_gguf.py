"""Write a GGUF file for llama.cpp whose prompts have the right ids.

    mistral-large convert MODEL mistral --as mistral
    python examples/gguf/to_gguf.py mistral model.gguf --llama-cpp LLAMA_CPP

LLAMA_CPP: a checkout of llama.cpp; its convert_hf_to_gguf.py does the work, with the vocabulary read from where it is
exact. Further options go to it, such as `--outtype bf16`.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


def write_vocabulary_files(source: Path, folder: Path) -> None:
    """Write the two files from which the converter gets the vocabulary, next to links to all others of `source`.

    Without tokenizer.model it reads tokenizer.json, takes the control tokens for ordinary ones and loses the scores.
    With its space before each text, the one that the chat template writes would be doubled.
    """
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "tokenizer.model").symlink_to((source / "tokenizer.model.v3").resolve())
    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**settings, "add_prefix_space": False}, ensure_ascii=False), encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file for llama.cpp.")
    parser.add_argument("source", type=Path, help="folder that `mistral-large convert --as mistral` wrote")
    parser.add_argument("output", type=Path, help="GGUF file to write")
    parser.add_argument("--llama-cpp", type=Path, required=True, help="checkout of llama.cpp")
    arguments, options = parser.parse_known_args()
    config = json.loads((arguments.source / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "mistral":
        sys.exit(f"{arguments.source}: model type {config['model_type']}; llama.cpp reads what `--as mistral` writes")
    with TemporaryDirectory() as folder:
        write_vocabulary_files(arguments.source, Path(folder))
        converter = str(arguments.llama_cpp / "convert_hf_to_gguf.py")
        # The name of the folder goes into the file.
        command = [sys.executable, converter, folder, "--outfile", str(arguments.output), *options]
        name = ["--model-name", arguments.source.resolve().name] if "--model-name" not in options else []
        sys.exit(subprocess.run([*command, *name], check=False).returncode)


if __name__ == "__main__":
    main()
