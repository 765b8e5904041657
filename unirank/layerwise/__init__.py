"""layerwise: run and watch one layer at a time.

In: a `LoadedModel` and token windows.
Out: how each layer is called (recording), which linears share an input (trace), moments and cosines
(statistics), gradients at the outputs of linears (backward), logits of the head alone (head).

Here one may run layers and hang hooks on them, which are gone when the function returns; what a lent
model was, it is again (lending). One layer
is in memory at a time; nothing is written but hidden states that do not fit.

Changed most often: a new statistic, which is a class beside `statistics._Grams` with `hooked`,
`add` and `finish`.
"""
