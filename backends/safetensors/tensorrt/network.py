"""Adding the layers of a bundle to a strongly typed network of TensorRT's Python API.

A quantized linear becomes

    static input        x  -> Quantize(s_x) -> Dequantize(s_x) NVFP4, MXFP8 input  x  ->
    DynamicQuantize -> Dequantize by the scales it computed weight              Constant ->
    Dequantize(s_w)          NVFP4: s_w = Dequantize(e4m3 scales, s_2) output
    MatrixMultiply, bias

which are the explicit Q/DQ pairs that TensorRT fuses into its integer, float8 and float4 kernels.
Every constant is named by its key in the bundle, so that the engine can be refitted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from backends.safetensors.source import rotated_modules
from backends.safetensors.tensorrt.api import DataType, Network, NetworkTensor
from backends.safetensors.tensorrt.loader import BundleWeights
from calib.schemes import PerChannel, TensorScheme, tensor_scheme_from_dict


@dataclass
class NetworkBuilder:
    """Adds layers to ``network`` with the weights of a bundle. Everything takes and returns
    ``trt.ITensor``.

    Attributes:
        network: a ``trt.INetworkDefinition``.
        weights: the bundle; it, and this object, must live until the engine is built.
    """

    network: Network
    weights: BundleWeights
    _arrays: list[npt.NDArray[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trt = self.weights.trt
        manifest = self.weights.bundle.manifest
        self._described = manifest.linears
        self._rotated = rotated_modules(manifest.tensors)
        self.dtype: DataType = {
            "float32": self.trt.DataType.FLOAT,
            "float16": self.trt.DataType.HALF,
            "bfloat16": self.trt.DataType.BF16,
        }[manifest.dtype]

    def constant(self, key: str, shape: tuple[int, ...] | None = None) -> NetworkTensor:
        """The tensor of the bundle under ``key``, as ``shape`` where one is given."""
        values = self.weights.weights(key)
        layer = self.network.add_constant(
            self.weights.forms[key].shape if shape is None else shape, values
        )
        layer.name = key
        self.network.set_weights_name(values, key)
        return layer.get_output(0)

    def array(self, values: npt.NDArray[Any], dtype: DataType | None = None) -> NetworkTensor:
        """A constant that is not in the bundle, cast to ``dtype`` (default: that of the bundle)."""
        self._arrays.append(np.ascontiguousarray(values))  # TensorRT does not copy it
        layer = self.network.add_constant(values.shape, self.trt.Weights(self._arrays[-1]))
        return self.cast(layer.get_output(0), self.dtype if dtype is None else dtype)

    def cast(self, x: NetworkTensor, dtype: DataType) -> NetworkTensor:
        """``x`` as ``dtype``."""
        return x if x.dtype == dtype else self.network.add_cast(x, dtype).get_output(0)

    def linear(self, x: NetworkTensor, name: str) -> NetworkTensor:
        """The linear ``name`` of the source model, with its rotation, quantization and bias.

        Args:
            x: ``[tokens, in]`` in the bundle's dtype.
            name: quantized or not.

        Returns:
            ``[tokens, out]``.
        """
        parameter, _, last = name.rpartition(".")
        # the experts of a 3-D parameter share a rotation
        rotated = parameter if last.isdigit() else name
        if rotated in self._rotated:
            x = self.rotate(x, rotated)
        described = self._described.get(name)

        if described is None:
            weight = self.constant(f"{name}.weight")
        else:
            if f"{name}.input_order" in self.weights.forms:
                x = self.network.add_gather(x, self.constant(f"{name}.input_order"), 1).get_output(
                    0
                )
            if described["input"] is not None:
                x = self._quantized_input(x, name, tensor_scheme_from_dict(described["input"]))
            weight = self._dequantized_weight(name, tensor_scheme_from_dict(described["weight"]))

        out = self.matmul(x, weight)
        if f"{name}.bias" not in self.weights.forms:
            return out

        width = self.weights.forms[f"{name}.bias"].shape[0]
        return self.binary("SUM", out, self.constant(f"{name}.bias", (1, width)))

    def rotates(self, name: str) -> bool:
        """Whether the bundle has an online rotation for the module ``name``; see :meth:`rotate`."""
        return name in self._rotated

    def rotate(self, x: NetworkTensor, name: str) -> NetworkTensor:
        """The online rotation of the module ``name``; see :mod:`backends.safetensors.source`.

        Args:
            x: ``[rows, width]``: the input of a linear, or the heads of queries or keys.
            name: a linear (of experts: their 3-D parameter), or an attention whose cache is
                quantized.
        """
        keys = [f"{name}.rotation.factors.{k}" for k in range(self._rotated[name])]
        orders = [self.weights.forms[key].shape[0] for key in keys]
        width = self.weights.forms[f"{name}.rotation.signs"].shape[0]
        x = self.binary("PROD", x, self.constant(f"{name}.rotation.signs", (1, width)))
        rest = int(np.prod(orders))
        done = width // rest

        for key, order in zip(keys, orders, strict=True):
            rest //= order
            if rest == 1:
                x = self.matmul(
                    self.reshape(x, (-1, done, order)), self.constant(key, (1, order, order))
                )
            else:
                x = self.matmul(
                    self.constant(key, (1, 1, order, order)),
                    self.reshape(x, (-1, done, order, rest)),
                )
            done *= order

        return self.reshape(x, (-1, width))

    def matmul(
        self, a: NetworkTensor, b: NetworkTensor, *, transposed: bool = False
    ) -> NetworkTensor:
        """``a b`` or ``a bᵀ``."""
        kinds = self.trt.MatrixOperation
        layer = self.network.add_matrix_multiply(
            a, kinds.NONE, b, kinds.TRANSPOSE if transposed else kinds.NONE
        )
        return layer.get_output(0)

    def binary(self, operation: str, a: NetworkTensor, b: NetworkTensor) -> NetworkTensor:
        """An elementwise operation, by its name in ``trt.ElementWiseOperation``."""
        return self.network.add_elementwise(
            a, b, getattr(self.trt.ElementWiseOperation, operation)
        ).get_output(0)

    def concatenate(self, parts: Sequence[NetworkTensor], axis: int) -> NetworkTensor:
        """``parts`` one behind the other along ``axis``."""
        layer = self.network.add_concatenation(parts)
        layer.axis = axis
        return layer.get_output(0)

    def reshape(
        self, x: NetworkTensor, shape: tuple[int, ...], *, permuted: tuple[int, ...] | None = None
    ) -> NetworkTensor:
        """``x`` as ``shape`` (-1: inferred, 0: kept), and then with its dimensions ``permuted``."""
        layer = self.network.add_shuffle(x)
        layer.reshape_dims = shape
        if permuted is not None:
            layer.second_transpose = permuted
        return layer.get_output(0)

    def _quantized_input(self, x: NetworkTensor, name: str, scheme: TensorScheme) -> NetworkTensor:
        types = self.trt.DataType
        if scheme.scale_format == "compute":
            scale = self.constant(f"{name}.input_scale")
            kind = types.FP8 if scheme.format.kind == "float" else types.INT8
            quantized = self.network.add_quantize(x, scale, kind).get_output(0)
            return self.network.add_dequantize(quantized, scale, self.dtype).get_output(0)

        # MXFP8: powers of two that TensorRT computes, without a factor of their own
        size: Any = scheme.granularity
        if scheme.scale_format != "e4m3":
            layer = self.network.add_dynamic_quantize(x, 1, size.size, types.FP8, types.E8M0)
            return self.network.add_dequantize(
                layer.get_output(0), layer.get_output(1), self.dtype
            ).get_output(0)

        # NVFP4: the scales that it computes are E4M3 themselves, and the calibrated one is theirs
        second = self.constant(f"{name}.input_scale")
        layer = self.network.add_dynamic_quantize(x, 1, size.size, types.FP4, types.FP8)
        layer.set_input(1, second)
        steps = self.network.add_dequantize(layer.get_output(1), second, self.dtype).get_output(0)

        return self.network.add_dequantize(layer.get_output(0), steps, self.dtype).get_output(0)

    def _dequantized_weight(self, name: str, scheme: TensorScheme) -> NetworkTensor:
        weight, scale = self.constant(f"{name}.weight"), self.constant(f"{name}.weight_scale")
        if f"{name}.weight_scale_2" in self.weights.forms:
            second = self.constant(f"{name}.weight_scale_2")
            scale = self.network.add_dequantize(scale, second, self.dtype).get_output(0)
        layer = self.network.add_dequantize(weight, scale, self.dtype)
        if isinstance(scheme.granularity, PerChannel):
            layer.axis = 1  # outputs of [in, out]
        return layer.get_output(0)
