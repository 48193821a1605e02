"""Seeds of the independent random streams of one run."""

from __future__ import annotations

import numpy as np


def stream_seed(seed: int, stream: str) -> int:
    """The seed of the stream called `stream` in the run of `seed`, in [0, 2^32).

    A hash of both, because torch's CPU generator reads nothing of a seed but its low 32 bits: seeds that differ above
    them give the same numbers, and small ones (seed + 1) are another run's.
    """
    return int(np.random.SeedSequence([seed % 2**64, *stream.encode()]).generate_state(1, np.uint32)[0])
