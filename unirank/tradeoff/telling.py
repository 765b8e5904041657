"""Progress of work that makes many points: the points are counted, and not told one by one."""

from __future__ import annotations

from unirank.progress import OnProgress

# Stages of a single point, which would begin again at each.
_WITHIN = ("truncate", "perplexity", "speed", "refine", "heal", "train", "sample", "distill")


def between_points(progress: OnProgress) -> OnProgress:
    """Who is told of what happens once, and not of the stages of each point."""

    def told_of(stage: str, done: int, total: int) -> None:
        if not stage.startswith(_WITHIN):
            progress(stage, done, total)

    return told_of
