"""cli: the terminal, and nothing else.

In: what was typed.
Out: a call of the library, its result as a table or as one JSON object, an exit code.

Here one may parse, print and translate; nothing is computed. Nothing heavy is imported before a
command runs: `--help` needs no torch. Options that several commands share stand in `options`, looks
in `views`, errors and Ctrl-C in `terminal`.

Changed most often: a command or an option is added; the function that it calls exists in the
library first.
"""
