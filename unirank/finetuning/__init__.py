"""finetuning: the factors are tuned, and the ranks stay.

In: a compressed checkpoint; training text, or calibration windows and the dense model.
Out: the same with other weights of the same shapes; held-out loss, or error of every layer, before and after.

Here one may train. Fine-tuning (tuning): adapters by peft (adapters), the loop by transformers' Trainer (loop), ours
are losses, phases, checks and what makes a killed run resume. Healing (healing): layer by layer (block), on the streams
of the dense and the compressed model, by what the loss feels of an error where that is known (output_metric).

Changed most often: a setting of `Finetune` or `Heal`.
"""
