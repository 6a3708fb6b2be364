"""Statistics of every decoder linear, and what a quantization scheme does to it: what ``rotq
stats`` reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.stats.clusters import cluster_channels, cluster_linears
    from calib.stats.damage import LinearDamage, linear_damage
    from calib.stats.linears import LinearMoments, linear_moments

__all__ = [
    "LinearDamage",
    "LinearMoments",
    "cluster_channels",
    "cluster_linears",
    "linear_damage",
    "linear_moments",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "clusters": (
                "cluster_channels",
                "cluster_linears",
            ),
            "damage": (
                "LinearDamage",
                "linear_damage",
            ),
            "linears": (
                "LinearMoments",
                "linear_moments",
            ),
        },
    )
