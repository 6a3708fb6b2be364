"""Faults of what comes before a backend: calibration, quantization, folding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calib.artifact import QuantizedLinear, QuantizedModel
from calib.quantizing.plan import Quantization
from tests.sabotage.base import Patch, Sabotage, replaced, result

_LOADED = ("exporter.run.artifacts", "load_artifact")
_FUSER = "calib.fusing.fuser"


def _model(change: Callable[[QuantizedModel], QuantizedModel]) -> Patch:
    """A calibrator that makes another artifact."""
    return result(*_LOADED, change)


def _linears(change: Callable[[QuantizedLinear], QuantizedLinear], only: str = "") -> Patch:
    return _model(
        lambda model: replace(
            model,
            linears={
                name: change(linear) if only in name else linear
                for name, linear in model.linears.items()
            },
        )
    )


def _inputs(change: Callable[[Tensor], Tensor], only: str = "") -> Patch:
    def changed(linear: QuantizedLinear) -> QuantizedLinear:
        assert linear.input_scale is not None
        return replace(linear, input_scale=change(linear.input_scale))

    return _linears(changed, only)


def _floats(name: str, change: Callable[[Tensor], Tensor]) -> Patch:
    return _model(
        lambda model: replace(
            model,
            floats={
                key: change(tensor.clone()) if key == name else tensor
                for key, tensor in model.floats.items()
            },
        )
    )


def _caches(keys: float, values: float) -> Patch:
    def changed(model: QuantizedModel) -> QuantizedModel:
        cache = model.cache
        assert cache is not None
        scaled = replace(
            cache,
            key_scale={layer: keys * scale for layer, scale in cache.key_scale.items()},
            value_scale={layer: values * scale for layer, scale in cache.value_scale.items()},
        )
        return replace(model, cache=scaled)

    return _model(changed)


def _plan(pattern: str) -> Patch:
    """A plan that loses linears without a word."""

    def thinned(plan: Quantization) -> Quantization:
        linears = {name: each for name, each in plan.linears.items() if pattern not in name}
        return replace(plan, linears=linears)

    return result("exporter.run.inputs", "quantization_of", thinned)


def _weights(change: Callable[[Tensor], Tensor]) -> Patch:
    """Rounding to nearest that rounds otherwise."""

    def wrap(original: Any) -> Any:
        def rounded(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            return replace(found, stored=change(found.stored))

        return rounded

    return lambda: replaced("calib.weights.algorithms", "Rtn._round", wrap)


def _folded(name: str, change: Callable[[Tensor], Tensor]) -> Patch:
    """A fold whose tensor ``name`` comes out otherwise."""

    def wrap(original: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            fused = original(self, *args, **kwargs)
            state = {
                key: change(tensor.clone()) if key == name else tensor
                for key, tensor in fused.state.items()
            }
            return replace(fused, state=state)

        return run

    return lambda: replaced(_FUSER, "_Fuser.run", wrap)


def row_scaled(tensor: Tensor, row: int = 1999, factor: float = 1.05) -> Tensor:
    """``tensor`` with one row scaled."""
    tensor[row] *= factor
    return tensor


def rows_zeroed(tensor: Tensor) -> Tensor:
    """``tensor`` without 64 rows that hardly any text reads."""
    tensor[1900:1964] = 0
    return tensor


def through_float16(tensor: Tensor) -> Tensor:
    """``tensor`` rounded to float16."""
    return tensor.half().to(tensor.dtype)


def down_one(stored: Tensor) -> Tensor:
    """Half of the weights one step down: what rounding down makes of rounding to nearest."""
    lower = stored.clone()
    lower[:, ::2] = (lower[:, ::2].short() - 1).clamp(min=-128).to(stored.dtype)
    return lower


def _turned(linear: QuantizedLinear) -> QuantizedLinear:
    return replace(linear, weight=linear.weight.T.contiguous())


def _a_tenth_more(scale: Tensor) -> Tensor:
    return 1.1 * scale


def _first_channel(linear: QuantizedLinear) -> QuantizedLinear:
    scale = linear.weight_scale.clone()
    scale[0] *= 1.05
    return replace(linear, weight_scale=scale)


def _exchanged(model: QuantizedModel) -> QuantizedModel:
    gate, up = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
    one, other = model.linears[gate], model.linears[up]
    return replace(
        model,
        linears={
            **model.linears,
            gate: replace(other, name=gate),
            up: replace(one, name=up),
        },
    )


_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_INT8, _KV, _WEIGHTS = "onnx int8", "onnx int8, kv int8", "onnx int8 weights"
CALIBRATION = (
    Sabotage("amax doubled", "every input amax x 2", _INT8, _inputs(lambda scale: 2 * scale)),
    Sabotage("amax halved", "every input amax x 0.5", _INT8, _inputs(lambda scale: scale / 2)),
    Sabotage(
        "amax 8.0",
        "ModelOpt replaced by amax = 8.0",
        _INT8,
        _inputs(lambda scale: torch.full_like(scale, 8 / 127)),
    ),
    Sabotage(
        "amax of a few",
        "input amax of every up_proj x 3",
        _INT8,
        _inputs(lambda scale: 3 * scale, "up_proj"),
    ),
    Sabotage(
        "amax of one",
        "input amax of a v_proj x 1.1",
        _INT8,
        _inputs(_a_tenth_more, "1.self_attn.v"),
    ),
    Sabotage(
        "amax of a kind",
        "input amax of every o_proj x 3",
        _INT8,
        _inputs(lambda scale: 3 * scale, "o_proj"),
    ),
    Sabotage(
        "amax of one alone",
        "input amax of an o_proj x 3",
        _INT8,
        _inputs(lambda scale: 3 * scale, "1.self_attn.o"),
        missed="no other linear reads its input, and a massive token in the text of calibration"
        " alone makes the same of the range of one layer",
    ),
    Sabotage(
        "amax doubled, bundle", "the same for tripy", "tripy int8", _inputs(lambda scale: 2 * scale)
    ),
    Sabotage(
        "amax doubled, float8",
        "the same for float8",
        "modelopt float8",
        _inputs(lambda scale: 2 * scale),
    ),
    Sabotage("cache doubled", "scales of keys and values x 2", _KV, _caches(2, 2)),
    Sabotage("keys halved", "scales of keys x 0.5", _KV, _caches(0.5, 1)),
    Sabotage(
        "rounded down", "int8 weights rounded down", _WEIGHTS, _weights(down_one), calibrates=True
    ),
    Sabotage(
        "rounded down, static", "the same with inputs", _INT8, _weights(down_one), calibrates=True
    ),
    Sabotage("down float", "all down_proj float", _INT8, _plan("down_proj"), calibrates=True),
    Sabotage("one float", "one q_proj float", _INT8, _plan("0.self_attn.q_proj"), calibrates=True),
    Sabotage(
        "scales 1 % large",
        "weight scales x 1.02",
        _WEIGHTS,
        _linears(lambda linear: replace(linear, weight_scale=1.02 * linear.weight_scale)),
    ),
    Sabotage("one channel", "scale of a channel x 1.05", _WEIGHTS, _linears(_first_channel, "up")),
    Sabotage("turned", "o_proj transposed", _WEIGHTS, _linears(_turned, "o_proj")),
    Sabotage("exchanged", "gate and up exchanged", _WEIGHTS, _model(_exchanged)),
    Sabotage(
        "biases lost",
        "biases of q, k, v dropped",
        "onnx int8, biases",
        _linears(lambda linear: replace(linear, bias=None)),
    ),
    Sabotage(
        "rotation lost",
        "down_proj without its R4",
        _INT8,
        _linears(lambda linear: replace(linear, online_rotation=None), "down"),
    ),
)
FLOATS = (
    Sabotage("embedding row", "one row x 1.05 in the artifact", _INT8, _floats(_TABLE, row_scaled)),
    Sabotage("rare rows", "64 rows zeroed in the artifact", _INT8, _floats(_TABLE, rows_zeroed)),
    Sabotage("head in float16", "lm_head through float16", _INT8, _floats(_HEAD, through_float16)),
    Sabotage(
        "final norm",
        "its gain x 1.001",
        _INT8,
        _floats("model.norm.weight", lambda tensor: 1.001 * tensor),
    ),
    Sabotage(
        "fold: embedding row",
        "one row x 1.05 folded",
        _INT8,
        _folded(_TABLE, row_scaled),
        calibrates=True,
    ),
    Sabotage(
        "fold: rare rows",
        "64 rows zeroed folded",
        _INT8,
        _folded(_TABLE, rows_zeroed),
        calibrates=True,
    ),
    Sabotage(
        "fold: head",
        "lm_head through float16",
        _INT8,
        _folded(_HEAD, through_float16),
        calibrates=True,
    ),
    Sabotage(
        "fold: gain",
        "a norm's gain x 1.001",
        _INT8,
        _folded("model.layers.1.input_layernorm.weight", lambda tensor: 1.001 * tensor),
        calibrates=True,
    ),
    Sabotage(
        "fold: down",
        "a down_proj row x 1.05",
        _INT8,
        _folded("model.layers.0.mlp.down_proj.weight", lambda tensor: row_scaled(tensor, 3)),
        calibrates=True,
    ),
    Sabotage(
        "fold: o",
        "an o_proj not rotated",
        _INT8,
        _folded("model.layers.0.self_attn.o_proj.weight", lambda tensor: tensor.flip(0)),
        calibrates=True,
    ),
)
