"""report: people look at it.

In: a compressed checkpoint; its store, a grid of perplexities and the dense model, where they are given.
Out: one self-contained HTML page (write, page), its charts as PNG and SVG (plots).

Here one may read and draw. What is shown is gathered first (gather), then drawn (svg, curves, page), so
that a chart never looks into a store by itself. No script, no font and no picture from elsewhere.

Changed most often: a section of the page (`page`), a number that it needs (`gather`).
"""
