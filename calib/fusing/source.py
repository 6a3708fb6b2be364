"""A checkpoint seen through the module tree: published names, stacked experts and tied embeddings
resolved.

Checkpoints name their tensors as the model was first published (Mixtral keeps a tensor per expert,
GPT-2 leaves out the ``transformer.`` prefix); the fuser works with the names of the transformers 5
module tree only.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from calib.architectures import Architecture, LinearSpec, Wiring
from calib.architectures.stored import canonical_name
from calib.errors import CheckpointError
from calib.network.checkpoint import Checkpoint

_WRAPPERS = {
    "_orig_mod.": "save the model inside torch.compile: model._orig_mod.save_pretrained(FOLDER)",
    "module.": "save the model inside its wrapper: model.module.save_pretrained(FOLDER)",
    "base_model.model.": "merge first: model.merge_and_unload().save_pretrained(FOLDER)",
    "base_layer.": "merge first: model.merge_and_unload().save_pretrained(FOLDER)",
}
"""What wrappers put into the names of tensors, and how to save what they wrap."""
_OTHER_CONFIG = "check that config.json belongs to these weights and that every shard is there"


class SourceTensors:
    """Reads the tensors of a model by their names in the module tree."""

    def __init__(
        self,
        checkpoint: Mapping[str, Tensor],
        wiring: Wiring,
        expected: dict[str, torch.Size],
    ) -> None:
        """
        Args:
            checkpoint: tensors by published names or names in the module tree.
            wiring: that of the model that they belong to.
            expected: shape of every tensor in the module tree.

        Raises:
            CheckpointError: a tensor is missing, or has another shape than the config calls for.
        """
        self._checkpoint = checkpoint
        stored = _stored_names(checkpoint, wiring.architecture, expected)
        if getattr(wiring.config, "tie_word_embeddings", False):
            tie(stored, wiring.embeddings[0].weight, wiring.head.weight)
        self._take(
            stored, expected, {spec.weight: spec for spec in wiring.linears if spec.stacked_from}
        )

    def _take(
        self,
        stored: dict[str, str],
        expected: Mapping[str, torch.Size],
        stacked: Mapping[str, LinearSpec] = MappingProxyType({}),
    ) -> None:
        """Find every tensor.

        Args:
            stored: stored names by those in the module tree.
            expected: shape of every tensor that is to be found.
            stacked: 3-D parameters whose experts may be stored one by one.
        """
        self._single: dict[str, str] = {}
        """Stored name of a tensor that is stored in one piece."""
        self._experts: dict[str, list[list[str]]] = {}
        """Stored names of the tensors that make up each expert, where experts are stored one by
        one.
        """
        for name, shape in expected.items():
            if name not in stored and name in stacked:
                self._experts[name] = _expert_names(stacked[name], shape[0], stored)
                for pieces in self._experts[name]:
                    self._check_shape(pieces, shape[1:])
            else:
                self._single[name] = _find(name, stored)
                self._check_shape([self._single[name]], shape)

    def unused(self) -> list[str]:
        """Names in the checkpoint that the model has no use for, sorted."""
        used = set(self._single.values())
        used |= {
            piece for experts in self._experts.values() for pieces in experts for piece in pieces
        }
        return sorted(set(self._checkpoint) - used)

    def read(self, name: str) -> Tensor:
        """The tensor called ``name`` in the module tree, in the dtype of the checkpoint.

        Raises:
            CheckpointError: it holds NaN or Inf, or no floating-point numbers.
        """
        if name in self._single:
            return self._finite(self._single[name])
        return torch.stack(
            [torch.cat([self._finite(piece) for piece in pieces]) for pieces in self._experts[name]]
        )

    def _finite(self, stored: str) -> Tensor:
        tensor = self._checkpoint[stored]
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"tensor {stored} holds {tensor.dtype}, not floating-point weights",
                hint="start from the floating-point checkpoint",
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"tensor {stored} holds NaN or Inf",
                hint="the checkpoint is damaged; download or export it again",
            )
        return tensor

    def _check_shape(self, pieces: list[str], wanted: torch.Size) -> None:
        """The rows of ``pieces`` in turn must make up a tensor of shape ``wanted``."""
        shapes = [self._shape(piece) for piece in pieces]
        together = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()
        if together != tuple(wanted):
            raise CheckpointError(
                f"tensor {' and '.join(pieces)} has shape {list(together)}, but the config calls"
                f" for {list(wanted)}",
                hint=_OTHER_CONFIG,
            )

    def _shape(self, stored: str) -> tuple[int, ...]:
        if isinstance(self._checkpoint, Checkpoint):
            return self._checkpoint.shape(stored)  # from the header of its file
        return tuple(self._checkpoint[stored].shape)


def _stored_names(
    checkpoint: Mapping[str, Tensor], architecture: Architecture, expected: dict[str, torch.Size]
) -> dict[str, str]:
    """From names in the module tree to names in the checkpoint."""
    return {canonical_name(name, architecture, expected): name for name in checkpoint}


def tie(stored: dict[str, str], embedding: str, head: str) -> None:
    """Let the head read the embedding, or the reverse if only the head was stored; two stored ones
    stay apart. The same goes for other tensors that are tied.

    transformers does the same when it loads a checkpoint (``PreTrainedModel.tie_weights``).
    """
    if embedding in stored:
        stored.setdefault(head, stored[embedding])
    elif head in stored:
        stored[embedding] = stored[head]


def _expert_names(spec: LinearSpec, experts: int, stored: dict[str, str]) -> list[list[str]]:
    return [
        [_find(piece.replace("{e}", str(expert)), stored) for piece in spec.stacked_from]
        for expert in range(experts)
    ]


def _find(name: str, stored: dict[str, str]) -> str:
    if name not in stored:
        wrapped = next((held for held in stored.values() if _bare(held) == _bare(name)), None)
        if wrapped is not None:
            raise CheckpointError(
                f"the checkpoint holds {wrapped}, expected {name}", hint=_wrapped_hint(wrapped)
            )
        raise CheckpointError(
            f"tensor {name} is missing from the checkpoint, but the config calls for it",
            hint=_OTHER_CONFIG,
        )
    return stored[name]


def _bare(name: str) -> str:
    """``name`` without what wrappers put into it."""
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _wrapped_hint(name: str) -> str:
    return next(hint for part, hint in reversed(_WRAPPERS.items()) if part in name)
