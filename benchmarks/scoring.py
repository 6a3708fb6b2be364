"""What comparing logits costs by how many positions are scored at once, as ratios in one run.

    python -m benchmarks.scoring [--vocabulary 49152] [--positions 256] [--rounds 5]

Random logits and a disturbed copy, in one thread, whose time is that of the processor.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from unittest.mock import patch

import torch

from calib.arithmetic.tiles import rows_at_once
from calib.measure import perplexity as scoring

TILES = (256, 64, 16, 4)


def main() -> None:
    """Print a line for each size, and one for what is used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--vocabulary", type=int, default=49152, help="default: SmolLM2's")
    parser.add_argument("--positions", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, arguments.positions, arguments.vocabulary, generator=generator)
    other = logits + 0.1 * torch.randn(logits.shape, generator=generator)
    row = torch.randint(arguments.vocabulary, (arguments.positions + 1,), generator=generator)

    def scored(tile: int) -> tuple[float, float]:
        """Median CPU milliseconds, and the divergence."""
        window, took = arguments.positions, []
        with patch.object(scoring, "rows_at_once", lambda x: tile):
            for _ in range(arguments.rounds):
                began = time.process_time()
                found = scoring.compare_logits(
                    lambda ids: logits, lambda ids: other, [row], window=window, stride=window
                )
                took.append(1e3 * (time.process_time() - began))
        return median(took), found.kl

    used = rows_at_once(logits[0])
    whole, divergence = scored(TILES[0])
    for tile in sorted({*TILES, used}, reverse=True):
        taken, kl = scored(tile)
        mark = "  (used)" if tile == used else ""
        print(
            f"{tile:>4} positions at once: {taken:7.1f} ms, x {whole / taken:.2f},"
            f" KL apart {abs(kl - divergence):.1e}{mark}"
        )


if __name__ == "__main__":
    main()
