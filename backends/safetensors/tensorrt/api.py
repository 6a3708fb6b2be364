"""What is used of TensorRT's Python API, as types: the package is optional, and has none.

Names are TensorRT's own, without the I in front. Enums such as ``trt.ElementWiseOperation`` are
looked up in the module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class DataType(Protocol):
    """A member of ``trt.DataType``."""

    @property
    def name(self) -> str:
        """``FLOAT``, ``INT8``, ``FP4``."""


class NetworkTensor(Protocol):
    """``trt.ITensor``: a value of a network."""

    name: str

    @property
    def dtype(self) -> DataType:
        """Of its elements."""


class Weights(Protocol):
    """``trt.Weights``: memory that TensorRT reads and does not copy."""

    @property
    def size(self) -> int:
        """How many values there are."""


class Layer(Protocol):
    """``trt.ILayer``."""

    name: str

    @property
    def type(self) -> object:
        """A member of ``trt.LayerType``."""

    def get_output(self, index: int) -> NetworkTensor:
        """What comes out."""

    def set_input(self, index: int, tensor: NetworkTensor) -> None:
        """What goes in."""


class ConstantLayer(Layer, Protocol):
    """``trt.IConstantLayer``."""

    weights: Weights

    @property
    def shape(self) -> Sequence[int]:
        """Of its values."""


class ShuffleLayer(Layer, Protocol):
    """``trt.IShuffleLayer``."""

    first_transpose: Sequence[int]
    reshape_dims: Sequence[int]
    second_transpose: Sequence[int]


class DequantizeLayer(Layer, Protocol):
    """``trt.IDequantizeLayer``."""

    axis: int


class ConcatenationLayer(Layer, Protocol):
    """``trt.IConcatenationLayer``."""

    axis: int


class SoftMaxLayer(Layer, Protocol):
    """``trt.ISoftMaxLayer``."""

    axes: int


class Network(Protocol):
    """``trt.INetworkDefinition``."""

    @property
    def num_layers(self) -> int:
        """How many layers it has."""

    def get_layer(self, index: int) -> Layer:
        """One of them."""

    def set_weights_name(self, weights: Weights, name: str) -> None:
        """Name weights for refitting."""

    def add_input(self, name: str, dtype: DataType, shape: Sequence[int]) -> NetworkTensor:
        """A value that is given to it."""

    def mark_output(self, tensor: NetworkTensor) -> None:
        """Make it a value that it gives."""

    def add_constant(self, shape: Sequence[int], weights: Weights) -> Layer:
        """Values that are always the same."""

    def add_cast(self, x: NetworkTensor, dtype: DataType) -> Layer:
        """Another dtype."""

    def add_gather(self, x: NetworkTensor, indices: NetworkTensor, axis: int) -> Layer:
        """Features in another order."""

    def add_shuffle(self, x: NetworkTensor) -> ShuffleLayer:
        """Another shape."""

    def add_concatenation(self, parts: Sequence[NetworkTensor]) -> ConcatenationLayer:
        """Values one behind the other."""

    def add_matrix_multiply(
        self, a: NetworkTensor, a_as: object, b: NetworkTensor, b_as: object
    ) -> Layer:
        """A product; ``a_as`` and ``b_as`` are members of ``trt.MatrixOperation``."""

    def add_elementwise(self, a: NetworkTensor, b: NetworkTensor, operation: object) -> Layer:
        """Two values; ``operation`` is a member of ``trt.ElementWiseOperation``."""

    def add_unary(self, x: NetworkTensor, operation: object) -> Layer:
        """One value; ``operation`` is a member of ``trt.UnaryOperation``."""

    def add_activation(self, x: NetworkTensor, kind: object) -> Layer:
        """One value; ``kind`` is a member of ``trt.ActivationType``."""

    def add_reduce(self, x: NetworkTensor, operation: object, axes: int, keep_dims: bool) -> Layer:
        """Over axes; ``operation`` is a member of ``trt.ReduceOperation``."""

    def add_softmax(self, x: NetworkTensor) -> SoftMaxLayer:
        """Over axes."""

    def add_quantize(self, x: NetworkTensor, scale: NetworkTensor, dtype: DataType) -> Layer:
        """With a scale that is given."""

    def add_dequantize(
        self, x: NetworkTensor, scale: NetworkTensor, dtype: DataType
    ) -> DequantizeLayer:
        """The inverse, in ``dtype``."""

    def add_dynamic_quantize(
        self, x: NetworkTensor, axis: int, size: int, dtype: DataType, scale_dtype: DataType
    ) -> Layer:
        """With scales of blocks that it computes, its second output."""


class Engine(Protocol):
    """``trt.ICudaEngine``."""


class Logger(Protocol):
    """``trt.ILogger``."""
