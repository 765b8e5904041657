"""diagnosis: is the paper's claim true here?

In: a store; its model and text for the readings that need them.
Out: `Diagnosis`: effective ranks against cosines in every reading, with permutation tests, spectra
and geometry; plots.

Here one may run the model over windows and change nothing.

Changed most often: a reading of "effective rank" is added (claim).
"""
