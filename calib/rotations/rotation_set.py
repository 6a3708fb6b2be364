"""The :class:`RotationSet`: every rotation of a model, which of them are folded and which run
online, and their origin.

Row-vector convention: a rotation ``Q`` takes an activation ``x`` to ``x Q``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.architectures import SPACE_OF, Dimensions, Kind, Space, Wiring
from calib.errors import RotationError
from calib.rotations.hadamard import apply_hadamard, block_order, hadamard_matrix
from calib.rotations.rotate import FOLDED, Rotate
from calib.rotations.starts import hadamard_start

# Largest entry of |Q^T Q - I| that counts as orthogonal: what a float32 matrix of a few thousand
# rows reaches.
ORTHOGONALITY_TOLERANCE = 1e-6
_NAME = re.compile(r"(R1)|(R[234])\.(\d+)(?:\.(\w+))?")
_ONLINE: tuple[Kind, ...] = ("r3", "r4")


@dataclass(frozen=True, eq=False)
class Rotation:
    """One rotation: a matrix, or a Hadamard matrix given by its order and the seed of its signs."""

    name: str
    """``R1``, ``R2.{layer}``, ``R3.{layer}``, ``R4.{layer}``, or ``R4.{layer}.{branch}`` for shared
    experts.
    """
    kind: Kind
    space: Space
    layer: int | None = None
    matrix: Tensor | None = None
    """float64 ``[n, n]``; R2 ``[kv_heads, head_dim, head_dim]``. ``None`` for a Hadamard matrix."""
    order: int | None = None
    seed: int | None = None
    """Seed of the signs of a Hadamard matrix; ``None`` for no signs."""
    block: int | None = None
    """Order of the matrices on the diagonal of a Hadamard matrix in blocks; ``None``: the largest
    that there is (:func:`~calib.rotations.hadamard.block_order`)."""
    online: bool = False
    """Applied to activations at run time (R3, R4) instead of folded into weights (R1, R2)."""
    origin: str = ""
    """How it was chosen."""

    def __post_init__(self) -> None:
        match = _NAME.fullmatch(self.name)
        layer = int(match[3]) if match and match[3] else None
        if match is None or (match[1] or match[2]).lower() != self.kind or layer != self.layer:
            raise RotationError(
                f"rotation name {self.name!r} does not fit kind {self.kind!r} and layer"
                f" {self.layer}",
                hint="names are R1, R2.{layer}, R3.{layer} and R4.{layer}",
            )
        if self.space is not SPACE_OF[self.kind]:
            raise RotationError(
                f"{self.name} acts on the {SPACE_OF[self.kind]} space, not on {self.space}"
            )

        if (self.matrix is None) == (self.order is None):
            raise RotationError(
                f"{self.name} needs either a matrix or the order of a Hadamard matrix, not both"
            )
        if self.online != (self.kind in _ONLINE) or (self.online and self.matrix is not None):
            raise RotationError(
                f"{self.name}: R1 and R2 are folded into weights, R3 and R4 are online Hadamard"
                " rotations",
                hint="give R3 and R4 an order and a seed",
            )
        if self.matrix is not None:
            # as it is stored: products with it are summed alike before that and afterwards
            object.__setattr__(self, "matrix", self.matrix.double().contiguous())

    @property
    def branch(self) -> str:
        """The ``ffn`` space within the layer; empty but for shared experts."""
        return self.name.split(".")[2] if self.name.count(".") == 2 else ""

    def dense(self) -> Tensor:
        """The float64 matrix ``[n, n]``, for R2 possibly ``[kv_heads, n, n]``, whichever way it is
        given.
        """
        if self.matrix is not None:
            return self.matrix
        assert self.order is not None  # by __post_init__
        return hadamard_matrix(self.order, seed=self.seed, block=self.block)

    @property
    def factored(self) -> int:
        """Order of the matrices on the diagonal of a Hadamard matrix, whose factors make it up."""
        assert self.order is not None  # asked of Hadamard matrices
        return self.block or block_order(self.order)

    def apply(self, x: Tensor) -> Tensor:
        """``x Q`` over the last dimension of ``x``, in the dtype and on the device of ``x``."""
        if self.matrix is None:
            return apply_hadamard(x, seed=self.seed, block=self.block)
        return x @ self.matrix.to(x)

    def undo(self, x: Tensor) -> Tensor:
        """``x Q^T``, the inverse of :meth:`apply`, in the dtype and on the device of ``x``."""
        if self.matrix is None:
            return apply_hadamard(x, seed=self.seed, block=self.block, transposed=True)
        return x @ self.matrix.mT.to(x)

    def to(self, device: torch.device | str) -> Rotation:
        """The same rotation with its matrix on ``device``."""
        return self if self.matrix is None else replace(self, matrix=self.matrix.to(device))


def fused_rotation(
    kind: Kind, matrix: Tensor, *, layer: int | None = None, origin: str = ""
) -> Rotation:
    """An R1 ``[n, n]`` or an R2 ``[kv_heads, n, n]`` given by its matrix, which is kept in float64.

    Raises:
        RotationError: ``kind`` is an online rotation.
    """
    return Rotation(_name(kind, layer), kind, SPACE_OF[kind], layer, matrix=matrix, origin=origin)


def hadamard_rotation(
    kind: Kind,
    order: int,
    *,
    layer: int | None = None,
    seed: int | None = None,
    block: int | None = None,
    branch: str = "",
    origin: str = "",
) -> Rotation:
    """A rotation that is a Hadamard matrix of ``order``, with signs from ``seed`` (``None``: no
    signs), in blocks of ``block`` (``None``: as large as there are).
    """
    name = _name(kind, layer) + (f".{branch}" if branch else "")
    words = "Hadamard" if block is None else f"Hadamard in blocks of {block}"
    return Rotation(
        name,
        kind,
        SPACE_OF[kind],
        layer,
        order=order,
        seed=seed,
        block=block,
        online=kind in _ONLINE,
        origin=origin or (words if seed is None else f"{words}, seed {seed}"),
    )


def hadamard_rotations(
    wiring: Wiring, kinds: Iterable[str], *, seed: int | None = 0, online_block: int | None = None
) -> RotationSet:
    """Hadamard rotations of the given kinds for every layer: a start for R1 and R2, and all there
    is to R3 and R4.

    On a model with LayerNorm, R1 is the Hadamard matrix reflected so that it fixes the all-ones
    vector.

    Args:
        wiring: that of the model.
        kinds: which of r1, r2, r3, r4.
        seed: of the signs of R1 and R2, ``None`` for no signs; see :func:`online_rotations` for R3
            and R4.
        online_block: as for :func:`online_rotations`.

    Raises:
        RotationError: a kind is refused for this architecture.
    """
    kinds, sizes = set(kinds), wiring.sizes
    rotations: list[Rotation] = []

    if "r1" in kinds and wiring.layer_norm:
        matrix = hadamard_start(sizes.hidden, seed, fix_ones=True)
        origin = f"Hadamard that fixes ones, seed {seed}"
        rotations.append(fused_rotation("r1", matrix, origin=origin))
    elif "r1" in kinds:
        rotations.append(hadamard_rotation("r1", sizes.hidden, seed=seed))

    if "r2" in kinds:
        rotations += [
            hadamard_rotation("r2", sizes.head_dim, layer=layer, seed=seed)
            for layer in range(sizes.layers)
        ]
    rotations += online_rotations(wiring, kinds, block=online_block)

    result = RotationSet(rotations)
    result.validate(wiring)
    return result


def online_rotations(
    wiring: Wiring, kinds: Collection[str], *, block: int | None = None
) -> list[Rotation]:
    """The online Hadamards among ``kinds``: R3 of order ``head_dim``, R4 of the width each down
    projection reads.

    They are made here and nowhere else. They have no signs: those would cost a product of their own
    in every layer of an exported graph, each time it runs. One of odd order is the identity; a run
    does without (:func:`idle_rotations`).

    Args:
        wiring: that of the model.
        kinds: which of r3, r4; others are passed over.
        block: a power of two, and R4 then is in blocks of the largest power of two of at most that
            size that divides its width; ``None``: in blocks as large as there are.
    """
    sizes = wiring.sizes
    rotations: list[Rotation] = []
    for layer in range(sizes.layers):
        if "r3" in kinds:
            rotations.append(hadamard_rotation("r3", sizes.head_dim, layer=layer))
        if "r4" in kinds:
            rotations += [
                hadamard_rotation(
                    "r4",
                    wiring.ffn_width(spec),
                    layer=layer,
                    block=None if block is None else math.gcd(wiring.ffn_width(spec), block),
                    branch=spec.branch,
                )
                for spec in wiring.ffn_readers(layer)
            ]
    return rotations


def idle_rotations(wiring: Wiring) -> dict[str, str]:
    """The kinds among R3 and R4 that are the identity in this model, with the reason.

    A rotation without signs does nothing where the largest Hadamard matrix whose order divides its
    own has order 1. That is so for odd orders and for no others: 2 divides all the rest.
    """
    readers = (spec for layer in wiring.layers for spec in wiring.ffn_readers(layer))
    orders: dict[str, tuple[str, set[int]]] = {
        "r3": ("head size", {wiring.sizes.head_dim}),
        "r4": ("width before the down projection", {wiring.ffn_width(spec) for spec in readers}),
    }
    return {
        kind: (
            f"its {what} of {' and '.join(map(str, sorted(widths)))} is odd, and a Hadamard matrix"
            " of odd order is the identity: it would rotate nothing"
        )
        for kind, (what, widths) in orders.items()
        if wiring.refusal(kind) is None and all(block_order(width) == 1 for width in widths)
    }


def check_offered(kinds: Collection[str], wiring: Wiring) -> None:
    """Refuse what the architecture refuses, and what would rotate nothing in this model.

    Raises:
        RotationError: with the reason, and the set to take instead.
    """
    idle = idle_rotations(wiring)
    reasons = {kind: wiring.refusal(kind) or idle.get(kind) for kind in sorted(kinds)}
    refused = {kind: reason for kind, reason in reasons.items() if reason is not None}
    if not refused:
        return

    kind = next(iter(refused))
    rest = set(kinds) - refused.keys() or {
        other for other in FOLDED if wiring.refusal(other) is None
    }
    raise RotationError(
        f"{kind.upper()} is refused for {wiring.family}: {refused[kind]}",
        hint=f"give --rotate {Rotate.of(rest)}",
    )


def _name(kind: Kind, layer: int | None) -> str:
    return kind.upper() if layer is None else f"{kind.upper()}.{layer}"


class RotationSet(Mapping[str, Rotation]):
    """Every rotation of one model, by name. Immutable; an empty set stands for folding the norms
    alone.
    """

    def __init__(self, rotations: Iterable[Rotation] = ()) -> None:
        self._rotations: dict[str, Rotation] = {}
        for rotation in rotations:
            if rotation.name in self._rotations:
                raise RotationError(f"rotation {rotation.name} is given twice")
            self._rotations[rotation.name] = rotation

    def __getitem__(self, name: str) -> Rotation:
        return self._rotations[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rotations)

    def __len__(self) -> int:
        return len(self._rotations)

    def __repr__(self) -> str:
        return f"RotationSet({', '.join(self)})"

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds present, in the order r1, r2, r3, r4."""
        present = {rotation.kind for rotation in self.values()}
        return tuple(kind for kind in SPACE_OF if kind in present)

    def r1(self) -> Rotation | None:
        """The rotation of the residual stream."""
        return self.get("R1")

    def r2(self, layer: int) -> Rotation | None:
        """The rotation of the values of ``layer``, per KV head."""
        return self.get(f"R2.{layer}")

    def r3(self, layer: int) -> Rotation | None:
        """The online rotation of queries and keys of ``layer``."""
        return self.get(f"R3.{layer}")

    def r4(self, layer: int, branch: str = "") -> Rotation | None:
        """The online rotation before the down projection of ``layer``, of its shared experts with
        that ``branch``.
        """
        return self.get(f"R4.{layer}.{branch}" if branch else f"R4.{layer}")

    def of(self, kinds: Iterable[str]) -> RotationSet:
        """The rotations of the given kinds alone."""
        wanted = set(kinds)
        return RotationSet(rotation for rotation in self.values() if rotation.kind in wanted)

    def merged(self, other: Iterable[Rotation]) -> RotationSet:
        """A set with the rotations of ``other`` added, replacing those of the same name."""
        return RotationSet(
            {**self._rotations, **{rotation.name: rotation for rotation in other}}.values()
        )

    def to(self, device: torch.device | str) -> RotationSet:
        """The same set with every matrix on ``device``."""
        return RotationSet(rotation.to(device) for rotation in self.values())

    def validate(self, wiring: Wiring) -> None:
        """Check that this set can be fused into the model of ``config``.

        Raises:
            RotationError: a rotation is refused for this architecture, names a layer that does not
                exist, has the wrong shape, is not orthogonal (``max |Q^T Q - I|`` above 1e-6), or
                is an R1 that does not fix the all-ones vector on a model with LayerNorm.
        """
        sizes = wiring.sizes
        for kind in self.kinds():
            reason = wiring.refusal(kind)
            if reason is not None:
                raise RotationError(f"{kind.upper()} is refused for {wiring.family}: {reason}")

        for rotation in self.values():
            if rotation.layer is not None and rotation.layer >= sizes.layers:
                raise RotationError(
                    f"{rotation.name} names a layer that this model of {sizes.layers} does not have"
                )
            _check_shape(rotation, wiring, sizes)
            defect = orthogonality_defect(rotation)
            if not defect <= ORTHOGONALITY_TOLERANCE:
                raise RotationError(
                    f"{rotation.name} is not orthogonal: max |Q^T Q - I| is {defect:.1e}, "
                    f"above {ORTHOGONALITY_TOLERANCE:.0e}",
                    hint="project it onto the nearest orthogonal matrix (polar factor) in float64",
                )
        r1 = self.r1()
        if r1 is not None and wiring.layer_norm:
            _check_fixes_ones(r1, sizes.hidden)


def orthogonality_defect(rotation: Rotation) -> float:
    """Largest entry of ``|Q^T Q - I|`` in float64; 0 for a Hadamard matrix, which is exact by
    construction.
    """
    if rotation.matrix is None:
        return 0.0
    q = rotation.matrix
    return float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().max())


def _check_shape(rotation: Rotation, wiring: Wiring, sizes: Dimensions) -> None:
    n = sizes.hidden if rotation.kind == "r1" else sizes.head_dim
    if rotation.kind == "r4":
        assert rotation.layer is not None  # by the name
        readers = wiring.ffn_readers(rotation.layer)
        widths = {spec.branch: wiring.ffn_width(spec) for spec in readers}
        if rotation.branch not in widths:
            raise RotationError(
                f"{rotation.name} names a branch that {wiring.family} does not have"
            )
        n = widths[rotation.branch]
    wanted = (sizes.kv_heads, n, n) if rotation.kind == "r2" else (n, n)
    shape = (rotation.order,) * 2 if rotation.matrix is None else tuple(rotation.matrix.shape)
    if shape != (wanted[-2:] if rotation.matrix is None else wanted):
        raise RotationError(
            f"{rotation.name} has shape {list(shape)} but the model needs {list(wanted)}",
            hint="use rotations that were made for this model",
        )


def _check_fixes_ones(r1: Rotation, hidden: int) -> None:
    """LayerNorm subtracts the mean along the all-ones vector, so R1 commutes with it only if ``1^T
    R1 = 1^T``.
    """
    ones = torch.ones(
        hidden, dtype=torch.float64, device=None if r1.matrix is None else r1.matrix.device
    )
    defect = float((r1.apply(ones) - ones).abs().max())
    if not defect <= ORTHOGONALITY_TOLERANCE:
        raise RotationError(
            f"R1 moves the all-ones vector by {defect:.1e}, and this model has LayerNorm, which R1"
            " would break",
            hint="start R1 from the Hadamard matrix that fixes the all-ones vector",
        )
