"""finetuning: the factors are tuned, and the ranks stay.

In: a compressed checkpoint, training text.
Out: the same with other factors of the same shapes; held-out loss before and after.

Here one may train: adapters by peft (adapters), the loop by transformers' Trainer (loop), ours are
losses, phases, checks and what makes a killed run resume (tuning).

Changed most often: a setting of `Finetune`.
"""
