"""The second moment ``H = E[x xᵀ]`` of the inputs of linears: all that GPTQ and AdaRound ask of
calibration data.

It is not centred: both minimise ``E|x dWᵀ|²``, in which a mean counts like anything else. All terms
of its diagonal are positive, and no other element is larger than ``√(H_ii H_jj)``, so nothing
cancels and float32 products of a few thousand tokens are good to their rounding; the mean over such
chunks is kept in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from calib.errors import QuantizationError, UnsupportedModelError
from calib.modules.watch import Run, require_finite, watching

_CHUNK_TOKENS = 2048
_BLOCK = 512
"""Rows of a moment that are updated at once, so that no product is as large as the moment itself.
"""


class Moment:
    """Running ``E[x xᵀ]`` of activations ``[..., n]``: n² float64 numbers, however many tokens
    there are.

    Attributes:
        tokens: tokens seen.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._matrix = torch.zeros((channels, channels), dtype=torch.float64, device=device)

    def update(self, x: Tensor) -> None:
        """Add the tokens of ``x`` [..., n], of any floating dtype; there may be none."""
        tokens = x.detach().reshape(-1, x.shape[-1])
        for first in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[first : first + _CHUNK_TOKENS]
            chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))
            self.tokens += len(chunk)
            self._matrix.mul_(1 - len(chunk) / self.tokens)
            for start in range(0, chunk.shape[1], _BLOCK):
                rows = slice(start, start + _BLOCK)
                self._matrix[rows].add_(
                    (chunk[:, rows].T @ chunk).to(self._matrix), alpha=1 / self.tokens
                )

    def merge(self, other: Moment) -> None:
        """Add all that ``other`` has seen, as if its tokens had been given to this accumulator."""
        if other.tokens:
            self.tokens += other.tokens
            self._matrix.lerp_(other._matrix.to(self._matrix), other.tokens / self.tokens)

    def result(self) -> Tensor:
        """The moment so far, float64 ``[n, n]`` on the CPU; the accumulator's own memory where it
        is there already.

        Raises:
            QuantizationError: no token has been seen.
        """
        if not self.tokens:
            raise QuantizationError("no token has been seen, so there is no second moment")
        return self._matrix.cpu()


def observe_moments(
    model: nn.Module, modules: Sequence[str], run: Run, *, first: bool = False
) -> dict[str, Moment]:
    """The second moments of the inputs of ``modules`` while ``run(model)`` runs.

    Modules that read the very same tensor (q, k and v; gate and up) get the same :class:`Moment`,
    taken once. Each matrix takes 8 n² bytes, 1.6 GB for n = 14336: of a large model, ask for one
    layer at a time.

    Args:
        model: whatever ``run`` runs.
        modules: dotted names of modules whose first argument is the activation ``[..., n]``.
        run: feeds batches without padding to the model, as
            :func:`calib.data.forward_loop.create_forward_loop` makes them.
        first: take inputs as they are before R4.

    Raises:
        CheckpointError: one of ``modules`` does not exist.
        QuantizationError: ``run`` never reached a module or gave it no token (all are named), or
            its input holds NaN or Inf.
        UnsupportedModelError: modules share their input in one call and not in another.
    """
    observer = _Observer()
    looks = {name: partial(observer.observe, name) for name in modules}
    with watching(model, inputs=looks, first=first):
        run(model)
    moments = {name: observer.moments[observer.leaders[name]] for name in modules}
    require_finite({name: moment.result() for name, moment in moments.items()})
    return moments


class _Observer:
    """Moments of the modules that are the first to read a tensor, and who reads it after them.

    Attributes:
        moments: by the name of the first reader, its *leader*.
        leaders: of every module that has been called, the leader; itself if it is one.
    """

    def __init__(self) -> None:
        self.moments: dict[str, Moment] = {}
        self.leaders: dict[str, str] = {}
        # The tensor itself is held, so that its memory cannot become another one that looks the
        # same.
        self._last: tuple[Tensor, int, str] | None = None

    def observe(self, name: str, x: Tensor) -> None:
        """Take in the input ``x`` of the module ``name``, unless it was taken in already."""
        leader = name if self._last is None or not _same(x, *self._last[:2]) else self._last[2]
        if self.leaders.setdefault(name, leader) != leader:
            raise UnsupportedModelError(
                f"'{name}' does not read the same tensor as '{self.leaders[name]}' each time the"
                " model runs",
                hint="Its input moment cannot be told from that of others.",
            )
        if leader != name:
            return
        if name not in self.moments:
            # MPS has no float64
            self.moments[name] = Moment(x.shape[-1], "cpu" if x.device.type == "mps" else x.device)
        self.moments[name].update(x)
        self._last = (x, _version(x), name)


def _same(x: Tensor, last: Tensor, version: int) -> bool:
    """Whether ``x`` is ``last``, or a view of exactly its memory, and holds what it held then."""
    return (
        x.data_ptr() == last.data_ptr()
        and x.shape == last.shape
        and x.stride() == last.stride()
        and x.dtype == last.dtype
        and _version(x) == version
    )


def _version(x: Tensor) -> int:
    """How often the memory of ``x`` has been written to. Inference tensors do not count, and are
    not written to.
    """
    return 0 if x.is_inference() else x._version
