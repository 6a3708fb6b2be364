"""Where activations are captured, how much of them is kept, and what that costs in bytes. Imports
no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from calib.errors import DataError

Rotation = Literal["r1", "r2"]


class SiteLike(Protocol):
    """One activation to capture: the input of a module.

    An ``"r1"`` site sees the residual space ``[..., hidden]`` (q_proj and up_proj inputs; q, k and
    v read the same tensor, so one of them is enough). An ``"r2"`` site sees o_proj's input ``[...,
    heads * head_dim]``.
    """

    @property
    def module(self) -> str:
        """The module's dotted name in the model."""

    @property
    def layer(self) -> int:
        """The index of its decoder layer."""

    @property
    def rotation(self) -> str:
        """The rotation that acts on it: ``"r1"`` or ``"r2"``; sites of other rotations are not
        captured.
        """


@dataclass(frozen=True)
class CaptureSite:
    """The plain :class:`SiteLike`."""

    module: str
    layer: int
    rotation: Rotation


@dataclass(frozen=True)
class CaptureConfig:
    """How much is kept.

    Attributes:
        reservoir_tokens: tokens kept for R1, over all its sites together.
        r2_tokens: tokens kept for R2 in each layer; each gives one sample per query head.
        massive_fraction: the part of either reservoir that is reserved for the tokens of largest
            absolute value.
        seed: decides which of the other tokens are kept.
    """

    reservoir_tokens: int = 16384
    r2_tokens: int = 1024
    massive_fraction: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            DataError: a reservoir holds fewer than two tokens, or the massive part is not in [0,
                0.5].
        """
        if min(self.reservoir_tokens, self.r2_tokens) < 2 or not 0 <= self.massive_fraction <= 0.5:
            raise DataError(
                f"cannot capture {self.reservoir_tokens} R1 and {self.r2_tokens} R2 tokens, "
                f"{self.massive_fraction:.0%} of them massive",
                hint=(
                    "Each reservoir needs at least 2 tokens, and at most half of them may be"
                    " massive ones."
                ),
            )

    def massive_tokens(self, capacity: int) -> int:
        """How many of ``capacity`` tokens are reserved for massive ones."""
        return int(self.massive_fraction * capacity)


@dataclass(frozen=True)
class CaptureBytes:
    """What a capture costs beyond the model and the activations of one batch, in bytes."""

    memory: int
    disk: int


def estimate_bytes(
    *,
    layers: int,
    hidden: int,
    heads: int,
    num_kv_heads: int,
    head_dim: int,
    config: CaptureConfig,
    sample_bytes: int,
) -> CaptureBytes:
    """An upper bound of what :func:`calib.capture.session.capture` allocates; constant in the
    number of tokens seen.

    Args:
        layers: decoder layers, each with two R1 sites and one R2 site.
        hidden: width of the residual.
        heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        config: the reservoir sizes.
        sample_bytes: bytes per element of the activations, which are kept in their own dtype: 2 for
            bfloat16 and float16, 4 for float32.

    Returns:
        Peak memory and size on disk. For Llama-2-7B in half precision (32, 4096, 32, 32, 128,
        defaults, 2): 0.78 GB and 0.68 GB.
    """
    accumulator = 8  # everything is accumulated in float64
    covariances = accumulator * (hidden**2 + layers * num_kv_heads * head_dim**2)
    # mean, sum of squares, minimum and maximum of each R1 site, the pooled R1, and each R2 layer
    channels = accumulator * 4 * ((2 * layers + 1) * hidden + layers * num_kv_heads * head_dim)
    r1_samples = sample_bytes * config.reservoir_tokens * hidden
    r2_samples = sample_bytes * layers * config.r2_tokens * heads * head_dim
    weights = 4 * (config.reservoir_tokens + layers * config.r2_tokens * (heads // num_kv_heads))
    kept = covariances + channels + r1_samples + r2_samples + weights
    # While running: the workspace, which is a chunk in float32, its squares and a block of products
    # in float64; and, in the dtype of the activations, the tokens of a chunk that enter a
    # reservoir.
    width = max(hidden, heads * head_dim)
    workspace = 4 * 2 * CHUNK_TOKENS * width + 8 * max(512 * hidden, num_kv_heads * head_dim**2)
    running = workspace + sample_bytes * CHUNK_TOKENS * width
    # At the end, instead: columns of the samples of R1, or those of an R2 layer twice, on the way
    # to their final order.
    finishing = workspace + sample_bytes * max(
        256 * config.reservoir_tokens, 2 * config.r2_tokens * width
    )
    return CaptureBytes(memory=kept + max(running, finishing), disk=kept)


CHUNK_TOKENS = 2048
"""Tokens that enter the statistics at once, whatever the batch: bounds the copies of an activation.
"""
