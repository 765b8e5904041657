"""report: people look at it.

In: a compressed checkpoint with what was measured of it; its store, a curve, a grid of perplexities and
the dense model, where they are given.
Out: one self-contained HTML page (write, page), its charts as PNG and SVG (plots); what `eval` measured, in the
checkpoint's record and on its page (keeping).

Here one may read and draw. What is shown is gathered first (gather), then said (first_screen, cautions) and
drawn (svg, curves, sections), so that a chart never looks into a store by itself. No script, no font and no
picture from elsewhere.

Changed most often: a warning (`cautions`), a section of the page (`sections`), a number that it needs (`gather`).
"""
