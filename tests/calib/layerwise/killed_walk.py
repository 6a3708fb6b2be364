"""Walk a model in forked processes that are killed at random points, until one of them gets to the
end.

A process of its own, because a fork of the test's would carry its threads' locks along. Prints, as
JSON, how many blocks were finished at each kill.

    python -m tests.calib.layerwise.killed_walk FOLDER SEED
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

from calib.fusing import FusedModel
from calib.layerwise.shards import JOURNAL
from tests.calib.layerwise.layerwise_support import lazily, walk
from tests.tiny import SIZES, make_tiny

LAYERS = 6
KILLS = 4
ASYMMETRIC = {"asym": True, "w_quant": True, "a_quant": True}


def main() -> None:
    folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    torch.set_num_threads(1)
    fused = lazily(make_tiny(transformers.LlamaConfig(**SIZES | {"num_hidden_layers": LAYERS})))
    started = time.monotonic()
    walk(fused, folder / "whole", ASYMMETRIC)
    per_block = (time.monotonic() - started) / LAYERS
    kills = []
    for after in sorted(chance.randrange(LAYERS) for _ in range(KILLS)):
        kills.append(kill_walk(fused, folder / "killed", after, chance.random() * per_block))
    walk(fused, folder / "killed", ASYMMETRIC, resume=True)
    json.dump(kills, sys.stdout)


def kill_walk(fused: FusedModel, work: Path, after: int, delay: float) -> int:
    """Fork a walk and kill it ``delay`` seconds after it has finished ``after`` blocks."""
    child = os.fork()
    if child == 0:
        walk(fused, work, ASYMMETRIC, resume=True)
        os._exit(0)
    while finished_blocks(work) < after:
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return finished_blocks(work)


def finished_blocks(work: Path) -> int:
    journal = work / JOURNAL
    return len(json.loads(journal.read_text())["shards"]) if journal.is_file() else 0


if __name__ == "__main__":
    main()
