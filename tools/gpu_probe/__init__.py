"""What a run on a GPU wants to know, one question a step; every answer is a line of the file RESULTS.

    python -m tools.gpu_probe STEP [--device cpu --tiny]     from the root of the source tree

Nothing here stops at a number that is worse than hoped: it is written down, and so is an error. `--device cpu --tiny`
tries the steps themselves. `tools/gpu_check.sh` runs them, each in a process and within a time of its own.
"""
