"""Generate with a compressed model: transformers alone, after `import unirank`.

    python examples/serve_with_transformers.py OUT --prompt "The capital of France is" --tokens 20

Add --fuse to multiply projections that read the same input at once. ecosystem.py shows peft and lm-eval as well.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import unirank  # teaches transformers the low-rank layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compressed", nargs="?", default="OUT", help="checkpoint that unirank made")
    parser.add_argument("--prompt", nargs="+", default=["The capital of France is"], help="one or more, in one batch")
    parser.add_argument("--tokens", type=int, default=20, help="new tokens at most")
    parser.add_argument("--fuse", action="store_true")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.compressed, dtype="auto", device_map=device).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.compressed, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if arguments.fuse:  # last, when the model is where it will run
        unirank.fuse(model)
    inputs = tokenizer(arguments.prompt, return_tensors="pt", padding=True).to(model.device)
    made = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    for text in tokenizer.batch_decode(made, skip_special_tokens=True):
        print(text)


if __name__ == "__main__":
    main()
