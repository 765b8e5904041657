"""tradeoff: how far one can go.

In: a dense model, stores of its analyses, one text or two; a ladder of fractions.
Out: `CurvePoint`s and a `Curve` of them: what each fraction costs in perplexity, and what it saves.

Here one may run the whole of a job for each point, and keep what was measured. The model that was lent
is dense again afterwards, and no checkpoint is written. A point is what `compress` and `eval` would give,
to the bit.

Changed most often: the ladder and where it gets finer (`ladder`), a column of the table (`showing`).
"""
