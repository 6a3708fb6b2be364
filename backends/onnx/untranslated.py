"""Which module of a model it was that could not be traced or translated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_OPERATOR = re.compile(r"OpOverload\(op='([\w.:]+)'")


class Running:
    """The modules that are in their forward pass, outermost first."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.failed: str | None = None

    def enter(self, name: str) -> None:
        """A module starts. The root starting while others still run means that an attempt before
        this one failed.
        """
        if name == "" and self.names:
            self._remember()
        self.names.append(name)

    def leave(self) -> None:
        """The innermost module is through."""
        self.names.pop()

    def culprit(self) -> str | None:
        """The innermost module that the first failed attempt did not come out of."""
        if self.names:
            self._remember()
        return self.failed

    def _remember(self) -> None:
        self.failed = self.failed or self.names[-1]
        self.names = []


@contextmanager
def running(network: nn.Module) -> Iterator[Running]:
    """Watch which modules of ``network`` run."""
    state = Running()
    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(_entering(state, name)))
        handles.append(module.register_forward_hook(_leaving(state)))
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()


def module_of(error: BaseException, program: torch.export.ExportedProgram) -> str | None:
    """The module that an operator without translation belongs to.

    Args:
        error: what the exporter raised; some exception of its chain names the operator.
        program: the traced program. The exporter decomposes its operators, ``aten.special_erf`` to
            ``prims.erf``.
    """
    operators = {
        name.rpartition(".")[2] for name in _OPERATOR.findall("\n".join(map(str, _chain(error))))
    }
    for node in program.graph.nodes:
        if any(operator in str(node.target) for operator in operators):
            stack = node.meta.get("nn_module_stack") or {}
            paths = [path for path, _ in stack.values()]
            return paths[-1] if paths else None

    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _entering(state: Running, name: str) -> Callable[[nn.Module, object], None]:
    def hook(_module: nn.Module, _args: object) -> None:
        state.enter(name)

    return hook


def _leaving(state: Running) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _args: object, _output: object) -> None:
        state.leave()

    return hook
