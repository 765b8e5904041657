"""models: a model, its linears, and what stands in their place.

In: a name or a path; a model in memory.
Out: `LoadedModel` (loading), its targets (structure), layers left on the disk (streamed), what is no such model and
why (folder, sources, wrappers), `LowRankLinear` (low_rank), `QuantizedLinear` (quantized), and the bridge by which
transformers builds them (quantizer).

Here one may touch modules and their parameters. Nothing here knows of calibration, ranks or
budgets, and nothing asks for a model's name: an architecture is understood by its structure.

Changed most often: `structure`, when an architecture holds its linears in a new way.
"""
