"""A checkpoint of a family that is not in the table, seen through its module tree: by the names
that transformers itself knows.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from calib.architectures import Wiring
from calib.errors import CheckpointError
from calib.fusing.source import SourceTensors, tie
from calib.modules.tree import template
from calib.network.published import Conversion, meta, published


class ConvertedTensors(SourceTensors):
    """Reads the tensors of a model by their names in the module tree; arguments and errors as for
    :class:`~calib.fusing.source.SourceTensors`.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Tensor],
        wiring: Wiring,
        expected: dict[str, torch.Size],
    ) -> None:
        self._checkpoint = checkpoint
        self._model = template(wiring.config, torch.float32)
        stored, conversions = published(self._model, checkpoint)
        for name, source in self._model.all_tied_weights_keys.items():
            tie(stored, source, name)
        self._converted: dict[str, Conversion] = {}
        """What makes a tensor that is not stored in one piece."""
        for conversion in conversions:
            shapes = conversion.run(lambda name: meta(self._shape(name)), self._model)
            for name, made in shapes.items():
                if expected.get(name) != made.shape:
                    pieces = [stored for stored, _ in conversion.pieces]
                    raise CheckpointError(
                        f"tensor {pieces[0]} and {len(pieces) - 1} others make {name} of shape"
                        f" {list(made.shape)}, but the config calls for"
                        f" {list(expected.get(name, ()))}",
                        hint="check that config.json belongs to these weights",
                    )
                self._converted[name] = conversion
        rest = {name: shape for name, shape in expected.items() if name not in self._converted}
        self._take(stored, rest)

    def unused(self) -> list[str]:
        """See :meth:`SourceTensors.unused`."""
        used = {name for each in self._converted.values() for name, _ in each.pieces}
        return [name for name in super().unused() if name not in used]

    def read(self, name: str) -> Tensor:
        """See :meth:`SourceTensors.read`."""
        if name not in self._converted:
            return super().read(name)
        made = self._converted[name].run(self._finite, self._model)
        return made[name]
