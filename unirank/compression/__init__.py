"""compression: ranks and a model become a checkpoint.

In: a `LoadedModel`, its store, a `RankPlan`.
Out: the same model with `LowRankLinear`s (truncation, or refine, the second pass), counted again
from its modules; a directory that transformers loads (checkpoint, card); the same with weights of
few bits (quantization); a plain one again (densified).

Here one may replace modules, and write checkpoints through `disk`. No rank is decided here.

Changed most often: the model card; what a checkpoint says of itself.
"""
