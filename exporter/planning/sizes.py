"""How large a model is, and what a run of it holds and writes, in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calib.architectures import architecture_of
from calib.capture.sites import CaptureBytes, estimate_bytes
from calib.errors import CheckpointError
from calib.rotations.rotate import trainable
from calib.schemes import LinearScheme, PerBlock, PerChannel, Scheme, TensorScheme
from exporter.planning.headers import CheckpointHeaders, TensorHeader
from exporter.recipe import Recipe, parse_size
from exporter.run.quantizing import capture_config
from exporter.run.tables import Tables

LIBRARY_BYTES = 500 * 2**20
"""Resident memory once torch, transformers and ModelOpt are imported; measured 473 MiB."""
FLOAT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_SCALES = ("_scale", "_zero_point")
_BLOCK = re.compile(r"\.\d+\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_EMBEDDING = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings)\.weight$")


@dataclass(frozen=True)
class Sizes:
    """What the estimates need to know about a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    seqlen: int
    blocks: tuple[TensorHeader, ...]
    """Weights of the decoder's linears."""
    head: int
    """Elements of the output projection."""
    embedding: int
    """Elements of the token embedding."""
    tables: Tables
    """Both of them."""
    parameters: int
    stored: int
    """Parameters once a tied head has its own copy."""

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one stored tensor."""
        return self.stored > self.parameters

    @property
    def attention(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def linears(self) -> list[str]:
        """Names of the decoder's linears."""
        return [tensor.name.removesuffix(".weight") for tensor in self.blocks]

    @property
    def linear_parameters(self) -> int:
        """Elements of the decoder's linears."""
        return sum(tensor.elements for tensor in self.blocks)

    def forward_flops(self, tokens: int) -> float:
        """Floating-point operations of a forward pass over that many tokens."""
        matmuls = 2 * (self.linear_parameters + self.head)
        return float(tokens) * (matmuls + 2 * self.layers * self.seqlen * self.attention)


def sizes_of(checkpoint: CheckpointHeaders, recipe: Recipe) -> Sizes:
    """The sizes of a model whose rows are as long as the recipe says.

    Raises:
        CheckpointError: the config holds a size that is none.
    """
    inner = checkpoint.config.get("text_config")
    config = inner if isinstance(inner, Mapping) else checkpoint.config

    def number(*keys: str, default: int = 1) -> int:
        value = next((config[key] for key in keys if config.get(key)), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"the config of '{checkpoint.source}' says {keys[0]} = {value!r:.60}",
                hint="check config.json",
            )
        return value

    hidden = number("hidden_size", "n_embd")
    heads = number("num_attention_heads", "n_head")

    # Weights only: the scales of an artifact are 1-D or 2-D too.
    weights = [
        tensor
        for tensor in checkpoint.tensors
        if len(tensor.shape) >= 2 and not tensor.name.endswith(_SCALES)
    ]
    embedding = next((tensor.elements for tensor in weights if _EMBEDDING.search(tensor.name)), 0)
    head = next((tensor.elements for tensor in weights if _HEAD.search(tensor.name)), 0)
    parameters = sum(tensor.elements for tensor in checkpoint.tensors)
    stored = parameters + (0 if head else embedding)
    family = architecture_of(checkpoint.config)
    return Sizes(
        hidden=hidden,
        layers=number("num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_dim=number("head_dim", default=hidden // heads),
        vocabulary=number("vocab_size"),
        seqlen=min(
            recipe.calibration.seqlen,
            number("max_position_embeddings", "n_positions", default=2**31),
        ),
        blocks=tuple(tensor for tensor in weights if _BLOCK.search(tensor.name)),
        head=head or embedding,
        embedding=embedding,
        tables=Tables(
            family.embeddings[0].name, family.head.name, embedding + (head or embedding), stored
        ),
        parameters=parameters,
        stored=stored,
    )


def weight_bytes(
    sizes: Sizes, scheme: Scheme, linears: Mapping[str, LinearScheme], dtype: str
) -> int:
    """Weights and scales of the quantized model, floats in ``dtype``.

    Args:
        sizes: of the model.
        scheme: of all linears of the decoder.
        linears: how the token embedding and the output head are quantized, where they are.
        dtype: what the target computes in.
    """
    width = FLOAT_BYTES[dtype]
    quantized = [(tensor.shape, scheme.weight) for tensor in sizes.blocks]
    for name, elements in (
        (sizes.tables.embedding, sizes.embedding),
        (sizes.tables.head, sizes.head),
    ):
        if name in linears:
            rows = elements // sizes.hidden
            quantized.append(((rows, sizes.hidden), linears[name].weight))

    total = sizes.stored * width
    for shape, weight in quantized:
        if weight is not None:
            total += _tensor_bytes(shape, weight, width) - math.prod(shape) * width
    return total


def _tensor_bytes(shape: Sequence[int], scheme: TensorScheme, width: int) -> int:
    """Of a quantized weight ``shape`` and its scales, ``width`` bytes each."""
    rows = math.prod(shape[:-1])
    match scheme.granularity:
        case PerChannel():
            scales = rows
        case PerBlock(size=size):
            scales = rows * math.ceil(shape[-1] / size)
        case _:
            scales = 1
    return math.ceil(math.prod(shape) * scheme.format.bits / 8) + scales * width


def capture_bytes(sizes: Sizes, recipe: Recipe, dtype: str) -> CaptureBytes:
    """What capturing costs beyond the model, of activations in ``dtype``."""
    return estimate_bytes(
        layers=sizes.layers,
        hidden=sizes.hidden,
        heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        config=capture_config(recipe),
        sample_bytes=FLOAT_BYTES[dtype],
    )


def peak_memory(
    sizes: Sizes, recipe: Recipe, captured: CaptureBytes, written: int, *, layerwise: bool
) -> int:
    """The libraries, the float32 model, the statistics, the largest weight in float64 twice, the
    logits of a batch, and the output.

    Args:
        sizes: of the model.
        recipe: batch size, and what a layer-wise run may hold.
        captured: of :func:`capture_bytes`.
        written: bytes of the output that are held, beside the model.
        layerwise: whether the run goes block by block.
    """
    largest = max((tensor.elements for tensor in sizes.blocks), default=0)
    if layerwise:
        block = sizes.linear_parameters // sizes.layers
        outside = (sizes.stored - sizes.linear_parameters) * 4
        held = parse_size(recipe.layerwise.max_memory)
        trains = trainable(recipe.rotate.certain) and not recipe.rotation.files
        statistics = captured.memory if trains else 0
        return LIBRARY_BYTES + max(8 * block, outside) + 16 * largest + held + statistics

    logits = recipe.calibration.batch_size * sizes.seqlen * sizes.vocabulary * 4
    return LIBRARY_BYTES + 4 * sizes.stored + captured.memory + 16 * largest + logits + written
