"""planning: a store and a budget become ranks.

In: an `AnalysisStore`, the fraction to remove, an allocator; for those that measure, the dense
model.
Out: a `RankPlan`, whose ranks cost at most the budget.

Here one may read spectra and cosines, and run the dense model with other modules in its linears'
places, which are put back. No weight is written. Planning and compression meet in `RankPlan` alone.

Changed most often: an allocator is added. One file in `allocator/`, one line in
`allocator/__init__.py`; docs/contributing.md.
"""
