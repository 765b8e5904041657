"""A compressed model is a model like any other: transformers, peft and lm-eval alone, after `import unirank`.

    pip install 'unirank[finetune,eval]'
    unirank compress MODEL --remove 0.4 -o OUT
    python examples/ecosystem.py OUT --text my-text.txt --task arc_easy --save TUNED

Loads OUT, generates, evaluates, tunes adapters on the factors, merges them, saves, loads again and evaluates again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import unirank  # noqa: F401 - teaches transformers the low-rank layers


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def scores(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> dict[str, float]:
    manager = TaskManager(include_path=arguments.include_path, include_defaults=arguments.include_path is None)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    found = simple_evaluate(harness, tasks=[arguments.task], task_manager=manager, limit=arguments.limit)
    assert found is not None
    return {key: value for key, value in found["results"][arguments.task].items() if key.startswith("acc")}


def tuned(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Any:
    """LoRA on both factors of every low-rank layer, by name; the merged model keeps its ranks."""
    ids = tokenizer(arguments.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // arguments.window * arguments.window].view(-1, arguments.window)
    data: Any = [{"input_ids": window, "labels": window} for window in windows]
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["left", "right"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    settings = TrainingArguments(
        output_dir=str(arguments.save / "trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=2,
        learning_rate=3e-4,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    Trainer(model=adapted, args=settings, train_dataset=data).train()
    adapted.save_pretrained(arguments.save / "adapter")
    return adapted.merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint that `unirank compress` made")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 file to tune on")
    parser.add_argument("--save", type=Path, required=True, help="directory for adapter and merged model")
    parser.add_argument("--task", default="arc_easy", help="task of lm-eval")
    parser.add_argument("--include-path", help="directory of further task definitions; lm-eval's own are then not read")
    parser.add_argument("--limit", type=int, help="documents of the task")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--window", type=int, default=128)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    parameters = model.num_parameters()
    print("loaded:", type(model).__name__, f"{parameters:,} parameters")
    print("generated:", continued(model, tokenizer, "The capital of France is"))
    print("evaluated:", scores(model, tokenizer, arguments))
    model = tuned(model, tokenizer, arguments).eval()
    print("tuned:", continued(model, tokenizer, "The capital of France is"))
    model.save_pretrained(arguments.save / "merged")
    tokenizer.save_pretrained(arguments.save / "merged")
    again: Any = AutoModelForCausalLM.from_pretrained(arguments.save / "merged")
    ids = tokenizer("Water boils when", return_tensors="pt")["input_ids"].to(model.device)
    with torch.no_grad():
        assert torch.equal(again.to(model.device)(ids).logits, model(ids).logits)
    assert again.num_parameters() == parameters
    print("saved and loaded again, the same logits:", scores(again, tokenizer, arguments))


if __name__ == "__main__":
    main()
