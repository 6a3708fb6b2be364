"""Does the export still compute the same? Rungs, each with its own figure and bound.

0. The files against the artifact: the numbers of every quantized linear, of the cache and of what
   is in float, bit by bit, and what the files beside them state. Nothing is altered. The artifact
   against the recipe, the rotated float weights and held-out inputs: which linears are quantized,
   how weights were rounded, and what of their range static scales leave unused.
1. The original float model against the rotated one: relative L2 of logits, at most 1e-5 in float32.
   The fold is exact.
2. The torch fake-quant reference, computed from the artifact alone, against the export *run in its
   runtime*. Each linear on identical inputs: at most 1e-5. End to end, where something is rounded
   to integers on the way, flips amplify, so the bound is twice the floor
   (:mod:`calib.measure.floor`) of the same run; where nothing is, it is 1e-5. A graph in float16 or
   bfloat16 may lose twice what the same fake-quant loses in torch in that dtype, and so may a
   default session that was asked and computes in such a dtype of its own accord.
3. The original float model against the export: KL divergence, top-1 agreement, perplexity. This is
   quality; the scheme says how much it may cost. And what both write when left to themselves: an
   export that repeats itself more than the original is no good, whatever its perplexity
   (:mod:`exporter.parity.behaviour`).

Relative L2 is ‖a − b‖ / ‖b‖ over all logits of all rows together. Never cosine: a scale wrong by
two leaves it at 1. What cannot be run on this machine is a row that says why; it is neither passed
nor failed.
"""

from __future__ import annotations

from exporter.parity.check import Check, check_parity
from exporter.parity.passes import runtime_logits
from exporter.parity.stored import kept_digests
from exporter.parity.subject import Subject

__all__ = ["Check", "Subject", "check_parity", "kept_digests", "runtime_logits"]
