"""Stand-ins for the native modules of Tripy, so that its real front end runs where there is no GPU.

``nvtripy`` imports ``tensorrt`` and ``mlir_tensorrt``, whose wheels need NVIDIA's index and a GPU.
Its front end (modules, state dicts, checks of dtype, rank and shape, tracing) is Python and asks
them for names of dtypes and for memory. Here memory is a torch tensor. Nothing can be compiled; the
interpreter beside this module runs traces.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

DTYPES = {
    "i1": torch.bool,
    "i4": torch.uint8,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f32": torch.float32,
}
ScalarTypeCode = enum.Enum("ScalarTypeCode", list(DTYPES))  # type: ignore[misc]
PointerType = enum.Enum("PointerType", ["host", "device"])
_NAMES = (
    "tensorrt",
    "mlir_tensorrt",
    "mlir_tensorrt.runtime",
    "mlir_tensorrt.runtime.api",
    "mlir_tensorrt.compiler",
    "mlir_tensorrt.compiler.api",
    "mlir_tensorrt.compiler.ir",
    "mlir_tensorrt.compiler.dialects",
    "mlir_tensorrt.compiler.dialects._ods_common",
    "mlir_tensorrt.compiler.dialects.affine",
    "mlir_tensorrt.compiler.dialects.func",
    "mlir_tensorrt.compiler.dialects.tensorrt",
)
_FRAMES = 30
"""Frames of a call stack that are kept: Tripy looks for the one of a caller of its own."""
_MODULES = "backends.safetensors.tripy.modules."
"""They hold classes of the nvtripy that they were imported with."""


class MTRTException(Exception):
    """What the runtime raises."""


class MemRefValue:
    """Host memory: a torch tensor."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.shape = list(data.shape)
        self.dtype = ScalarTypeCode[
            next(name for name, dtype in DTYPES.items() if dtype == data.dtype)
        ]
        self.address_space = PointerType.host

    def __dlpack__(self, **_: Any) -> Any:
        return self.data.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.data.__dlpack_device__()

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self.data.numpy())


class RuntimeClient:
    """Makes memory."""

    def create_memref(self, array: Any = None, *, shape: Any, dtype: Any, **_: Any) -> MemRefValue:
        values = torch.zeros(shape) if array is None else torch.tensor(list(array)).reshape(shape)
        return MemRefValue(values.to(DTYPES[dtype.name]))

    def create_memref_view_from_dlpack(
        self, capsule: Any, *, assert_canonical_strides: bool
    ) -> MemRefValue:
        data = dlpack.from_dlpack(capsule)
        if assert_canonical_strides and not data.is_contiguous():
            wanted = list(torch.empty(data.shape, device="meta").stride())
            raise MTRTException(
                f"Given strides {list(data.stride())} do not match canonical strides {wanted} for"
                f" shape {list(data.shape)}"
            )
        return MemRefValue(data)


class _StandIn(ModuleType):
    """A module of which every name is a class, enough for annotations and class bodies."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _record_less() -> None:
    """Tripy records the call stack of every operation, and looks up columns in every frame: most of
    a test's time.
    """
    module = import_module("nvtripy.utils.stack_info")

    def get_stack_info(include_code_index: int | None = None) -> Any:
        found = module.StackInfo([], include_code_index)
        frame = sys._getframe().f_back
        while frame is not None and len(found) < _FRAMES:
            code = frame.f_code
            info = module.SourceInfo(
                module=frame.f_globals.get("__name__"),
                file=code.co_filename,
                line=frame.f_lineno,
                function=code.co_name,
                code=None,
                _dispatch_target="",
                column_range=None,
            )
            if info.module == "nvtripy.utils.function_registry" and info.function == "wrapper":
                info._dispatch_target = frame.f_locals["key"]
            found.append(info)
            frame = frame.f_back
        return found

    module.get_stack_info = get_stack_info


@contextmanager
def tripy() -> Iterator[ModuleType]:
    """``nvtripy`` over the stand-ins; afterwards neither is in ``sys.modules``."""
    for name in _NAMES:
        module = _StandIn(name)
        module.__path__ = []
        module.__spec__ = ModuleSpec(name, None)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    runtime = sys.modules["mlir_tensorrt.runtime.api"]
    for value in (MTRTException, MemRefValue, RuntimeClient, ScalarTypeCode, PointerType):
        setattr(runtime, value.__name__, value)
    try:
        nvtripy = import_module("nvtripy")
        _record_less()
        # it is only needed until here, and torch looks whether it is installed
        del sys.modules["tensorrt"]
        yield nvtripy
    finally:
        for name in list(sys.modules):
            if name.split(".")[0] in ("tensorrt", "mlir_tensorrt", "nvtripy") or name.startswith(
                _MODULES
            ):
                del sys.modules[name]
