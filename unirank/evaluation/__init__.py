"""evaluation: what a model is worth.

In: any causal language model, dense or compressed, and a text or tasks.
Out: `EvalReport` (perplexity), `Speed` (tokens a second), `TaskReport` (tasks of lm-eval), each with all
that a comparison needs; the records of a measured curve.

Here one may run the whole model and change nothing about it. A window whose loss is no number is an
error, never skipped.

Changed most often: what a report carries.
"""
