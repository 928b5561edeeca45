"""Whether the processor's cores are this process's own for the moment.

On a shared host a core may be one of two threads of a physical one, and the other thread somebody else's. Its load
takes up to half of the vector units, and more of the unit that multiplies tiles, for milliseconds or minutes, and no
counter of this machine shows it. So a yardstick of a tenth of a millisecond, neither ours nor a peer's work, is timed
between samples: a small product in bfloat16 on each thread, against the best that it has taken in this run.
"""

from __future__ import annotations

import functools
import time

import torch

# A product that takes longer than its best by this has company: alone it varies by 10 %, beside others it takes twice.
SLACK = 1.25
# Products to try: behind other work the first three or four find cold caches and take 1.2 to 5 times as long, on a core
# that nobody else uses; and any may meet an interrupt.
TRIES = 8
# Of the rounds of samples: where so many were quiet, the others do not count.
ENOUGH = 1 / 3
# The product's side, as large as it may be and take less than LONGEST: processors without tiles have a smaller one.
SIDES = (384, 192, 96)
LONGEST = 1e-3


class Quiet:
    """Calls say whether the machine is quiet now, on so many threads."""

    def __init__(self, threads: int) -> None:
        self.best = float("inf")
        for side in SIDES:
            # Kept for the whole run, whichever mode it is made in.
            with torch.inference_mode(False):
                left, right, out = (torch.ones(threads, side, side, dtype=torch.bfloat16) for _ in range(3))
            self._product = functools.partial(torch.bmm, left, right, out=out)
            if min(self._seconds() for _ in range(20)) < LONGEST:
                break
        for _ in range(50):
            self()

    def __call__(self) -> bool:
        """Time the yardstick until it is as fast as alone, or has been tried ``TRIES`` times."""
        for _ in range(TRIES):
            seconds = self._seconds()
            self.best = min(self.best, seconds)
            if seconds <= SLACK * self.best:
                return True
        return False

    def wait(self, patience: float) -> float:
        """Return once the machine is quiet, or after ``patience`` seconds; return the seconds that it took."""
        begin = time.perf_counter()
        # Without a pause: after one of 2 ms the first products take up to three times as long, whoever else is there.
        while not self() and time.perf_counter() - begin < patience:
            pass
        return time.perf_counter() - begin

    def _seconds(self) -> float:
        begin = time.perf_counter()
        self._product()
        return time.perf_counter() - begin


@functools.cache
def of_threads(threads: int) -> Quiet:
    """Return the yardstick of a run: its best is that of all cases so far."""
    return Quiet(threads)
