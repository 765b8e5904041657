"""analysis: a model and calibration windows become a store.

In: a `LoadedModel`, a `Calibration`, a scheme.
Out: an `AnalysisStore`: energies, factors, cosines and damping of every linear, with the identity
of what they depend on.

Here one may spend time: everything expensive happens before the store is whole, and is resumed after a
kill. Nothing here depends on a ratio. One layer at a time, all files through `disk`.

Changed most often: a scheme is added. One file in `scheme/`, one line in `scheme/__init__.py`;
docs/contributing.md.
"""
