"""Finding and replacing modules by their dotted path."""

from __future__ import annotations

from torch import Tensor, nn

from calib.errors import CheckpointError

_CONV1D = "transformers.pytorch_utils"


def get_submodule(module: nn.Module, attr_name: str) -> nn.Module:
    """The module at a dotted path, through ``ModuleList`` (integer parts), ``ModuleDict`` (keys)
    and attributes.

    Args:
        module: where the path starts.
        attr_name: such as ``transformer.h.0.attn.c_attn``; the empty path is ``module`` itself.

    Raises:
        CheckpointError: a part of the path does not exist; the error names the part and what exists
            beside it.

    Source: ``get_submodule`` of the nanoGPT example in NVIDIA's TensorRT-Incubator.
    """
    current = module
    walked: list[str] = []
    for part in attr_name.split(".") if attr_name else ():
        child = _child(current, part)
        if child is None:
            where = ".".join(walked) or type(module).__name__
            known = ", ".join(name for name, _ in current.named_children()) or "none"
            raise CheckpointError(
                f"'{where}' has no submodule '{part}' (wanted '{attr_name}')",
                hint=f"its submodules are: {known}",
            )
        walked.append(part)
        current = child
    return current


def set_submodule(module: nn.Module, attr_name: str, replacement: nn.Module) -> None:
    """Put ``replacement`` where :func:`get_submodule` finds ``attr_name``."""
    parent, _, leaf = attr_name.rpartition(".")
    get_submodule(module, parent).register_module(leaf, replacement)


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer: ``nn.Linear``, or transformers' ``Conv1D``, which
    stores ``[in, out]``.
    """
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``; by name, because transformers takes seconds
    to import.
    """
    return any(
        base.__name__ == "Conv1D" and base.__module__ == _CONV1D for base in type(module).__mro__
    )


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear as ``[out, in]``, a view."""
    weight = linear.get_parameter("weight")
    return weight.T if is_conv1d(linear) else weight


def linears_but_head(model: nn.Module) -> list[str]:
    """Names of all linears of ``model``, but for the output head of a causal LM."""
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    return [
        name for name, module in model.named_modules() if is_linear(module) and module is not head
    ]


def _child(module: nn.Module, part: str) -> nn.Module | None:
    if isinstance(module, nn.ModuleList | nn.Sequential):
        index = int(part) if part.lstrip("-").isdigit() else None
        return module[index] if index is not None and -len(module) <= index < len(module) else None
    if isinstance(module, nn.ModuleDict):
        return dict(module.items()).get(part)
    child = getattr(module, part, None)
    return child if isinstance(child, nn.Module) else None
