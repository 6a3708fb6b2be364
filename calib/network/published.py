"""Where a checkpoint has the tensors of a module tree, by what transformers itself knows of the
names and forms in which models were published (``transformers.conversion_mapping``).

It renames (prefixes, modules that were called otherwise), and it converts: experts that are stored
one by one become one 3-D parameter, fused projections are split, and so on. The operations are
transformers' own, run when a tensor is read, on the tensors that it is made of alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.errors import CheckpointError
from calib.files.reading import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Conversion:
    """Stored tensors that together make one tensor of the module tree, or several.

    Attributes:
        name: of the first of them.
        pieces: stored name and the pattern of the mapping that it matched, in the order in which
            they are put together.
        converter: of transformers, unused.
    """

    name: str
    pieces: tuple[tuple[str, str], ...]
    converter: Any

    def run(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> Mapping[str, Tensor]:
        """What the pieces make, by name.

        Args:
            read: gives a stored tensor; those on the meta device give shapes alone.
            model: the module tree, on the meta device.

        Raises:
            CheckpointError: the pieces do not fit together.
        """
        converter = deepcopy(self.converter)
        for stored, pattern in self.pieces:
            converter.add_tensor(self.name, stored, pattern, _Held(read(stored)))
        try:
            found = converter.convert(self.name, model=model, config=model.config)
        except Exception as error:  # whatever an operation makes of tensors that do not fit
            raise CheckpointError(
                f"{self.pieces[0][0]} and others do not make up {self.name}: {reason_of(error)}",
                hint=(
                    "check that config.json belongs to these weights, and that every shard is there"
                ),
            ) from error
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor
            for name, tensor in found.items()
        }


@dataclass(frozen=True)
class _Held:
    """A tensor, as transformers asks for those that it reads itself."""

    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor


def published(
    model: PreTrainedModel, names: Collection[str]
) -> tuple[dict[str, str], list[Conversion]]:
    """Of every stored tensor, what it is in the module tree of ``model``.

    Args:
        model: the module tree, on the meta device.
        names: of the stored tensors.

    Returns:
        Stored names by the name in the module tree, of tensors that are stored as they are; and
        what is made of others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    state, prefix = model.state_dict(), model.base_model_prefix
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    single: dict[str, str] = {}
    pieces: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(names, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, state)
        if name not in state:  # it has the name of the module tree, up to the prefix
            name, pattern = rename_source_key(stored, [], [], prefix, state)
        if pattern is None:
            single[name] = stored
        else:
            pieces.setdefault(name, []).append((stored, pattern))
    conversions = [
        Conversion(name, tuple(own), by_pattern[own[0][1]]) for name, own in pieces.items()
    ]
    return single, conversions


def meta(shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape without data."""
    return torch.empty(shape, device="meta")
