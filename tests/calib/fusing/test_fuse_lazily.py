"""A lazily fused model: the same bytes, computed when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.architectures import Wiring
from calib.errors import CheckpointError, RotationError, UnsupportedModelError
from calib.fusing import FusedModel, fuse, materialize
from calib.network.layout import StockTensors
from calib.rotations.rotation_set import RotationSet, fused_rotation

OfName = Callable[[str], Any]


class Counting(Mapping[str, Tensor]):
    """A checkpoint that counts the elements that are read of it."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.elements = 0

    def __getitem__(self, name: str) -> Tensor:
        self.elements += self.tensors[name].numel()
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def fold(
    tiny: Any, state: Mapping[str, Tensor], *, lazy: bool, dtype: torch.dtype = torch.float32
) -> FusedModel:
    return fuse(
        state,
        tiny.wiring,
        tiny.rotations(tiny.offered()),
        dtype=dtype,
        lazy=lazy,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_and_their_order_are_those_of_the_eager_state(
    tiny: Any, dtype: torch.dtype
) -> None:
    eager, lazy = (fold(tiny, tiny.state, lazy=lazy, dtype=dtype) for lazy in (False, True))
    assert isinstance(eager.state, dict)
    assert list(eager.state) == list(lazy.state)
    assert len(eager.state) == len(lazy.state)
    stock, lazy_stock = (StockTensors(one.state, one.wiring) for one in (eager, lazy))
    for name, tensor in stock.items():
        assert torch.equal(lazy_stock[name].view(torch.uint8), tensor.view(torch.uint8)), name
        assert tensor.data_ptr() == eager.state[name].data_ptr()  # turning it copies nothing
        assert lazy.state[name].is_contiguous() or name in tiny.wiring.turned_weights
    assert (lazy.unused, lazy.refusals, lazy.dtype) == (eager.unused, eager.refusals, eager.dtype)


def test_a_bias_that_a_reader_takes_from_its_norm_is_computed_too(tiny_of: OfName) -> None:
    tiny = tiny_of("gpt2")
    tiny.state["transformer.ln_f.weight"][7] = 1e-9
    eager, lazy = (fold(tiny, tiny.state, lazy=lazy) for lazy in (False, True))
    assert list(lazy.state)[-1] == "lm_head.bias"
    assert torch.equal(lazy.state["lm_head.bias"], eager.state["lm_head.bias"])
    assert lazy.refusals == eager.refusals != ()


def test_only_norms_are_read_at_once_and_only_what_is_asked_for_later(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    plain = fuse(tiny.state, tiny.wiring, RotationSet(), dtype=torch.float32)
    shapes = Counting(tiny.state)
    lazy = fold(tiny, shapes, lazy=True)
    shapes.elements = 0
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in lazy.state
    assert "model.layers.1.mlp.up_proj.bias" not in lazy.state
    assert list(lazy.state) == list(plain.state)
    assert shapes.elements == 0
    first, second = lazy.state[name], lazy.state[name]
    assert shapes.elements == 2 * tiny.state[name].numel()
    assert first.data_ptr() != second.data_ptr()


def test_nothing_shares_memory_with_the_checkpoint(tiny: Any) -> None:
    state = {name: tensor.float() for name, tensor in tiny.state.items()}
    lazy = fuse(state, tiny.wiring, RotationSet(), dtype=torch.float32, lazy=True)
    held = {tensor.data_ptr() for tensor in state.values()}
    assert not any(tensor.data_ptr() in held for tensor in lazy.state.values())


def test_a_lazy_model_materializes(tiny_of: OfName, tokens: Tensor) -> None:
    tiny = tiny_of("qwen2_moe")
    eager, lazy = (materialize(fold(tiny, tiny.state, lazy=lazy)) for lazy in (False, True))
    with torch.no_grad():
        assert torch.equal(eager(tokens).logits, lazy(tokens).logits)


def test_what_is_wrong_with_the_tensors_as_a_whole_is_raised_at_once(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    missing = {
        name: tensor for name, tensor in tiny.state.items() if "layers.1.mlp.up_proj" not in name
    }
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is missing"):
        fold(tiny, missing, lazy=True)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has shape \[44, 48\]"):
        fold(
            tiny, tiny.state | {"model.layers.1.mlp.up_proj.weight": torch.zeros(44, 48)}, lazy=True
        )
    rotations = RotationSet([fused_rotation("r1", torch.eye(44))])
    with pytest.raises(RotationError, match="R1"):
        fuse(tiny.state, tiny.wiring, rotations, dtype=torch.float32, lazy=True)
    entry = replace(tiny.wiring.architecture, norms=())
    tiny.wiring = Wiring(entry, tiny.config)
    with pytest.raises(UnsupportedModelError, match="input_layernorm"):
        fold(tiny, tiny.state, lazy=True)


def test_what_is_wrong_with_values_is_raised_when_they_are_asked_for(tiny_of: OfName) -> None:
    tiny = tiny_of("llama")
    name = "model.layers.0.self_attn.k_proj.weight"
    tiny.state[name][3, 5] = torch.nan
    tiny.state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    lazy = fold(tiny, tiny.state, lazy=True, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or Inf"):
        lazy.state[name]
    with pytest.raises(CheckpointError, match=r"up_proj\.weight does not fit float16"):
        lazy.state["model.layers.1.mlp.up_proj.weight"]
    tiny.state["model.norm.weight"][0] = torch.inf
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight holds NaN or Inf"):
        fold(tiny, tiny.state, lazy=True)
