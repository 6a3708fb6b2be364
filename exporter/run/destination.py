"""What a run is for: a backend, its targets, what they compute in and what they refuse. Imports no
torch, so that planning can use it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backends.asking import (
    check,
    expressible,
    files_of,
    reasons_against,
    refusal_of,
    refused_rotations,
    warnings_of,
)
from backends.base import Backend, BlocksRotations, Request
from backends.registry import get_backend, target_of
from calib.architectures.spec import KINDS
from calib.errors import BackendError
from calib.schemes import LinearScheme, TensorScheme
from exporter.recipe import Recipe

logger = logging.getLogger(__name__)

COMPUTED = ("float32", "float16", "bfloat16")
"""What a target can compute in."""


@dataclass(frozen=True)
class Destination:
    """A backend and the runtimes that it is to write for."""

    backend: Backend
    targets: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Destination:
        """Where a recipe goes.

        Raises:
            BackendError: there is no such backend or target.
        """
        backend = get_backend(recipe.backend)
        return cls(backend, tuple(target_of(backend, target) for target in recipe.targets))

    def dtype(self, target: str, asked: str, own: Callable[[], str]) -> str:
        """What ``target`` computes in, by name: what was asked for, else its own dtype, else that
        of the weights.

        Args:
            target: one of the targets.
            asked: the recipe's dtype, which may be ``auto``.
            own: dtype of the checkpoint or artifact; called only where nothing else decides.
        """
        if asked != "auto":
            return asked
        name = self.backend.compute_dtype(target) or own()
        return name if name in COMPUTED else "float32"

    def dtypes(self, asked: str, own: Callable[[], str]) -> dict[str, str]:
        """What each target computes in; arguments as for :meth:`dtype`."""
        return {target: self.dtype(target, asked, own) for target in self.targets}

    def common_dtype(self, asked: str, own: Callable[[], str]) -> str:
        """What all targets compute in; arguments as for :meth:`dtype`.

        Raises:
            BackendError: they differ, and one calibration rounds to one dtype.
        """
        names = self.dtypes(asked, own)
        if len(set(names.values())) > 1:
            words = ", ".join(f"{target} in {name}" for target, name in names.items())
            raise BackendError(
                f"the targets compute in different dtypes: {words}",
                hint=(
                    "give --dtype, or run 'rotq calibrate' once and 'rotq export --from-artifact'"
                    " for all of them"
                ),
            )
        return names[self.targets[0]]

    def check(
        self,
        recipe: Recipe,
        config: Mapping[str, Any],
        linears: Mapping[str, LinearScheme],
        cache: TensorScheme | None,
        rotations: Collection[str],
        prefix: int = 0,
    ) -> None:
        """Refuse what a target cannot express, before the long job.

        Args:
            recipe: says how the model is to be written.
            config: Hugging Face config of the model.
            linears: how each linear is quantized.
            cache: how the KV cache is, if it is.
            rotations: kinds of rotations that it has for certain.
            prefix: how many tokens stand before every sequence, for certain.

        Raises:
            BackendError: with the reason.
        """
        for target in self.targets:
            written = self._request(target, recipe, linears)
            request = replace(
                written, cache=cache, rotations=tuple(rotations), config=config, prefix=prefix
            )
            check(self.backend, request)

    def takes(self, linears: Mapping[str, LinearScheme], config: Mapping[str, Any]) -> bool:
        """Whether every target expresses ``linears`` of the model of ``config``, and runs them
        fast.
        """
        requests = (Request(target, linears=linears, config=config) for target in self.targets)
        return not any(reasons_against(self.backend, request) for request in requests)

    def files(
        self, target: str, recipe: Recipe, linears: Mapping[str, LinearScheme], nbytes: int
    ) -> Sequence[str]:
        """The files that the backend writes for ``target``; see
        :class:`~backends.base.ListsFiles`.

        Args:
            target: one of the targets.
            recipe: says how the model is to be written.
            linears: how each linear is quantized.
            nbytes: of all weights and scales, about.
        """
        request = self._request(target, recipe, linears)
        return files_of(self.backend, replace(request, prefix=recipe.certain_prefix), nbytes)

    def warnings(
        self, linears: Mapping[str, LinearScheme], rotations: Collection[str] = ()
    ) -> list[str]:
        """What the targets express, but run slowly.

        Args:
            linears: how each linear is quantized.
            rotations: kinds of rotations that the model has for certain.
        """
        return [
            f"target '{target}': {warning}"
            for target in self.targets
            for warning in warnings_of(self.backend, target, linears, rotations)
        ]

    def warn(self, linears: Mapping[str, LinearScheme], rotations: Collection[str] = ()) -> None:
        """Log :meth:`warnings`, with the same arguments."""
        for warning in self.warnings(linears, rotations):
            logger.warning("%s", warning)

    def online_block(self) -> int | None:
        """Size of the blocks of R4 that every target takes; ``None``: any. See
        :class:`~backends.base.BlocksRotations`."""
        if not isinstance(self.backend, BlocksRotations):
            return None
        blocks = (self.backend.online_block(target) for target in self.targets)
        return min((block for block in blocks if block is not None), default=None)

    def refused_kinds(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Kinds of rotations that a target cannot express, with the first one's reason.

        Args:
            config: Hugging Face config of the model.
        """
        reasons: dict[str, str] = {}
        for target in self.targets:
            for kind, reason in refused_rotations(self.backend, target, KINDS, config).items():
                reasons.setdefault(kind, f"target '{target}' cannot express it: {reason}")
        return reasons

    def expresses(self, linear: LinearScheme) -> bool:
        """Whether every target can express a linear of this scheme."""
        return all(expressible(self.backend, target, [linear], None) for target in self.targets)

    def refused_prefix(self) -> str | None:
        """Why a target cannot have a prefix, if one cannot."""
        for target in self.targets:
            refused = refusal_of(self.backend, Request(target, prefix=1))
            if refused is not None:
                return f"target '{target}' cannot have one: {refused}"
        return None

    def _request(self, target: str, recipe: Recipe, linears: Mapping[str, LinearScheme]) -> Request:
        """What is asked of a target, but for what only a model says."""
        return Request(
            target,
            linears=linears,
            logits=recipe.logits,
            kv_buffer=recipe.kv_buffer,
            int8_weights=recipe.int8_weights,
            max_shard_bytes=recipe.max_shard_bytes,
            dtype=recipe.dtype,
        )


def default_output(recipe: Recipe, goal: str) -> Path:
    """``out/MODEL-SCHEME-TARGET`` of an export; of what is for no target, ``out/MODEL-SCHEME``; of
    what no scheme shapes, ``out/MODEL-GOAL``.
    """
    model = Path(recipe.model).expanduser()
    name = (model.resolve() if model.exists() else model).name
    match goal:
        case "export":
            words = (name, recipe.scheme, *Destination.of(recipe).targets)
        case "calibrate":
            words = (name, recipe.scheme)
        case _:
            words = (name, goal)
    return Path("out") / "-".join(words)
