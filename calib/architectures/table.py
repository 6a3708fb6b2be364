"""The table: one row for each family, in a module for each kind of rows.

A row is checked by the equivalence tests: logits before and after fusing agree in float64. Names
are those of the module tree in transformers 5.
"""

from __future__ import annotations

from calib.architectures.architecture import Architecture
from calib.architectures.table_experts import SPARSE
from calib.architectures.table_layer_norm import LAYER_NORM
from calib.architectures.table_post_norm import POST_NORMS
from calib.architectures.table_pre_norm import PRE_NORM

ARCHITECTURES: tuple[Architecture, ...] = (*PRE_NORM, *SPARSE, *LAYER_NORM, *POST_NORMS)
