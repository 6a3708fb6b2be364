"""What a backend is tried with: every scheme that a target accepts, and a few models that differ in
more than that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backends.asking import expressible, refusal_of, refused_rotations
from backends.base import Backend, Request, WriteOptions
from backends.testing.models import FAMILIES, tiny_model
from calib.architectures import Kind, wiring_for
from calib.artifact import QuantizedModel
from calib.quantizing.plan import customised
from calib.schemes import KV_SCHEMES, LINEAR_SCHEMES, SCHEMES, LinearScheme, Scheme

_ONLINE: tuple[Kind, ...] = ("r1", "r2", "r3", "r4")
_FOLDED: tuple[Kind, ...] = ("r1", "r2")

VARIANTS: dict[str, Scheme] = {
    "int8-zero-points": customised(
        SCHEMES["int8"], weight_symmetric=False, activation_symmetric=False
    ),
    "int8-clusters": customised(SCHEMES["int8"], activation_granularity="cluster:4"),
    "int4-blocks-of-32": customised(SCHEMES["int4-weight-only"], block_size=32),
    "int4-zero-points": customised(SCHEMES["int4-weight-only"], weight_symmetric=False),
}
"""Presets with finer controls."""


@dataclass(frozen=True)
class Case:
    """One model for one target."""

    target: str
    scheme: str
    """A preset, or one of :data:`VARIANTS`."""
    family: str
    rotate: tuple[Kind, ...] = _FOLDED
    kv: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()

    @property
    def id(self) -> str:
        """Its name among the tests."""
        more = [kind for kind in self.rotate if kind not in _FOLDED] + [f"kv-{self.kv}"] * (
            self.kv is not None
        )
        return "-".join(
            [self.target, self.scheme, self.family, *more, *(["mixed"] if self.overrides else [])]
        )

    def model(self, dtype: str | None) -> QuantizedModel:
        """The model, in the dtype that the target computes in."""
        return tiny_model(
            self.family,
            VARIANTS.get(self.scheme) or SCHEMES[self.scheme],
            rotate=self.rotate,
            dtype=getattr(torch, dtype or "float32"),
            kv=self.kv,
            overrides=self.overrides,
        )


def cases(
    backend: Backend,
    families: tuple[str, ...],
    *,
    online: bool,
    targets: tuple[str, ...] | None = None,
) -> Iterator[Case]:
    """Every case that ``backend`` says it can express.

    Args:
        backend: what is tried.
        families: those of :data:`~backends.testing.models.FAMILIES` to try; the first one with
            every scheme.
        online: try rotations that run online as well.
        targets: those to try; ``None`` for all.
    """
    first, *others = families
    for target in backend.targets if targets is None else targets:
        accepted = [
            name
            for name, linear in linear_schemes().items()
            if expressible(backend, target, [linear], None)
        ]
        if not accepted:
            continue

        # models are asked for with a scheme that the target takes, so that they alone are refused
        taken = linear_schemes()[accepted[0]]
        tried = [family for family in families if _takes_model(backend, target, family, taken)]
        if first in tried:
            yield Case(target, "float", first)
            yield from (Case(target, scheme, first) for scheme in accepted)
        yield from (Case(target, accepted[0], family) for family in others if family in tried)
        refused = refused_rotations(backend, target, _ONLINE)
        kinds = tuple(kind for kind in _ONLINE if kind not in refused)
        if first in tried and online and kinds != _FOLDED:
            yield Case(target, accepted[0], first, kinds)
        if first in tried and len(accepted) > 1:
            yield Case(target, accepted[0], first, overrides=(("*.down_proj", _preset(accepted)),))
        for kv, scheme in KV_SCHEMES.items():
            if first in tried and expressible(backend, target, [], scheme):
                yield Case(target, accepted[0], first, kv=kv)


def _takes_model(backend: Backend, target: str, family: str, scheme: LinearScheme) -> bool:
    """Whether ``target`` takes a model of ``family`` whose decoder is quantized by ``scheme``."""
    config = FAMILIES[family]()
    linears = dict.fromkeys(wiring_for(config).quantizable, scheme)
    request = Request(target, linears=linears, config=config.to_dict())
    return refusal_of(backend, request) is None


def linear_schemes() -> dict[str, LinearScheme]:
    """Presets and variants, by name."""
    variants = {
        name: linear for name, scheme in VARIANTS.items() if (linear := scheme.linear) is not None
    }
    return {**LINEAR_SCHEMES, **variants}


def _preset(accepted: list[str]) -> str:
    """Another preset than the first; overrides take no variants."""
    return next((name for name in accepted[1:] if name in SCHEMES), accepted[0])


def write(backend: Backend, case: Case, folder: Path) -> QuantizedModel:
    """Write the model of ``case`` into ``folder``, which exists and is empty; returns the model."""
    model = case.model(backend.compute_dtype(case.target))
    backend.write(model, folder, WriteOptions(case.target))
    return model


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by relative path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def state_of(model: QuantizedModel) -> dict[str, str]:
    """SHA-256 of every tensor of ``model``, by key."""
    tensors: dict[str, Tensor] = dict(model.floats)
    for linear in model.linears.values():
        tensors |= linear.tensors()
    return {
        key: hashlib.sha256(
            tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        ).hexdigest()
        for key, tensor in tensors.items()
    }


def one_per_target(tried: Iterable[Case]) -> list[Case]:
    """The first case of each target that quantizes something."""
    chosen: dict[str, Case] = {}
    for case in tried:
        if case.scheme != "float":
            chosen.setdefault(case.target, case)
    return list(chosen.values())
