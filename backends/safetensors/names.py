"""What the tensors of a model are called in a checkpoint: experts one by one, and names as they are
published.

transformers 5 keeps the experts of a layer as two 3-D parameters; checkpoints hold a linear for
each expert and each of gate, up and down, and so does vLLM's loader. transformers merges them again
when it loads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from backends.rows import rows_of
from calib.architectures import LinearSpec, Wiring, wiring_of
from calib.architectures.experts import expert_index
from calib.artifact import QuantizedLinear

_WEIGHT = ".weight"


@dataclass(frozen=True)
class Names:
    """The names of one model."""

    wiring: Wiring

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Names:
        """Of the model that a Hugging Face config, as a dictionary, describes."""
        return cls(wiring_of(config))

    @property
    def specs(self) -> Mapping[str, LinearSpec]:
        """Table entries of everything in the decoder that may be quantized, by name; of experts one
        by one.
        """
        return self.wiring.quantizable

    def quantized_table(self, linears: Collection[str]) -> str | None:
        """The first embedding that is among the quantized ``linears``."""
        return next((table.name for table in self.wiring.embeddings if table.name in linears), None)

    def experts_apart(self, linears: Collection[str]) -> str | None:
        """A 3-D expert parameter that is left in float while another one is among the quantized
        ``linears``.
        """
        left = [parameter for parameter in self.experts if f"{parameter}.0" not in linears]
        return left[0] if 0 < len(left) < len(self.experts) else None

    def in_one_piece(self, linears: Collection[str]) -> str | None:
        """A 3-D expert parameter, among the quantized ``linears``, that checkpoints hold as it is
        instead of one tensor for each expert; a plan knows it by its published name.
        """
        return next(
            (
                parameter
                for parameter, spec in self.experts.items()
                if not spec.stacked_from
                and (
                    f"{parameter}.0" in linears
                    or self.published(parameter).removesuffix(_WEIGHT) in linears
                )
            ),
            None,
        )

    def published(self, name: str) -> str:
        """The published name of a module or tensor."""
        for ours, theirs in self.wiring.architecture.published:
            name = name.replace(ours, theirs)
        return name

    def source(self, name: str) -> str:
        """The inverse of :meth:`published`."""
        for ours, theirs in reversed(self.wiring.architecture.published):
            name = name.replace(theirs, ours)
        return name

    def modules(self, name: str) -> tuple[str, ...]:
        """The modules that hold the linear ``name``: itself, or those whose rows follow each other
        in an expert's.
        """
        spec = self.specs.get(name)
        if spec is None or spec.layout != "experts":
            return (self.published(name),)
        return self.expert_modules(spec, expert_index(name))

    def expert_modules(self, spec: LinearSpec, expert: int) -> tuple[str, ...]:
        """The modules of one expert of the 3-D parameter of ``spec``."""
        names = (stored.replace("{e}", str(expert)) for stored in spec.stacked_from)
        return tuple(self.published(name.removesuffix(_WEIGHT)) for name in names)

    def transposed(self, name: str) -> bool:
        """Whether checkpoints hold the weight of the linear ``name`` as ``[in, out]`` (GPT-2's
        Conv1D).
        """
        spec = self.specs.get(name)
        return spec is not None and spec.layout == "conv1d"

    @cached_property
    def experts(self) -> dict[str, LinearSpec]:
        """Table entries of the 3-D expert parameters, by name."""
        return {spec.name: spec for spec in self.wiring.linears if spec.layout == "experts"}

    def parameter(self, name: str) -> str | None:
        """The 3-D parameter that holds the expert's linear ``name``; ``None`` for any other
        linear.
        """
        spec = self.specs.get(name)
        return None if spec is None or spec.layout != "experts" else name.rpartition(".")[0]

    def stored(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A float tensor of the source model as checkpoints hold it: under its published name,
        experts one by one.
        """
        spec = self.experts.get(key)
        if spec is None or not spec.stacked_from:
            yield self.published(key), tensor
            return
        for expert, weight in enumerate(tensor):
            modules = self.expert_modules(spec, expert)
            for module, rows in zip(modules, weight.chunk(len(modules)), strict=True):
                yield f"{module}.weight", rows

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of :meth:`stored` for all float tensors of a checkpoint; experts that are not
        there are left out.

        Raises:
            KeyError: some of a layer's experts are missing.
        """
        stacked: dict[str, Tensor] = {}
        gathered_keys: set[str] = set()
        for parameter, spec in self.experts.items():
            experts = [self.expert_modules(spec, expert) for expert in range(self.wiring.experts)]
            keys = {f"{module}.weight" for modules in experts for module in modules}
            if keys & tensors.keys():
                stacked[parameter] = torch.stack(
                    [
                        torch.cat([tensors[f"{module}.weight"] for module in modules])
                        for modules in experts
                    ]
                )
                gathered_keys |= keys

        return stacked | {
            self.source(key): tensor for key, tensor in tensors.items() if key not in gathered_keys
        }

    def rows(self, linear: QuantizedLinear) -> Iterator[tuple[str, QuantizedLinear]]:
        """``linear`` by module: its rows in equal shares."""
        modules = self.modules(linear.name)
        share = linear.weight.shape[0] // len(modules)
        for index, module in enumerate(modules):
            yield (
                module,
                (
                    linear
                    if len(modules) == 1
                    else rows_of(linear, slice(index * share, (index + 1) * share))
                ),
            )
