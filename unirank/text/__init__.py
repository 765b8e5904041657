"""text: from a source to token windows.

In: a file, records, a dataset's name; a tokenizer.
Out: int64 windows `[W, T]`, for calibration and perplexity (windows) and for training
(training_windows), with the hash of the text that they are of.

Here one may read files and ask `datasets`. Structured data that is not understood is refused: it
must never be read as prose.

Changed most often: a kind of file (`files`), a kind of record (`conversations`), a corpus by name
(`records.NAMED`).
"""
