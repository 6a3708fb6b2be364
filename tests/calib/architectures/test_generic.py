"""The architecture of a family that is not in the table, from its module tree."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from calib.architectures import Wiring, merged_linears, wiring_for
from calib.architectures.trials import is_fused, is_known, is_linear_map
from calib.errors import RotationError
from calib.fusing import fuse, materialize
from calib.rotations.rotation_set import RotationSet, check_offered
from tests.census.configs import seeded_model, tiny_config
from tests.tiny import relative_l2


@pytest.fixture(scope="module")
def dense() -> Any:
    return seeded_model(tiny_config("persimmon"))


@pytest.fixture(scope="module")
def sparse() -> Any:
    return seeded_model(tiny_config("dots1"))


def _wiring(model: Any) -> Wiring:
    return wiring_for(model.config)


def test_linears_of_the_decoder_layers_are_found_and_nothing_else(dense: Any) -> None:
    wiring = _wiring(dense)
    parts = ["self_attn.query_key_value", "self_attn.dense"]
    parts += ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    wanted = [f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts]
    assert list(wiring.linear_names) == wanted
    assert (wiring.head.name, wiring.embeddings[0].name) == ("lm_head", "model.embed_tokens")
    assert wiring.norms == ()
    assert wiring.capture_sites == ()


def test_every_tensor_is_quantizable_or_untouched(sparse: Any) -> None:
    wiring = _wiring(sparse)
    outside = {"lm_head.weight", "model.embed_tokens.weight"}
    weights = {spec.weight for spec in wiring.linears}
    biases = {spec.bias for spec in wiring.linears if spec.bias in sparse.state_dict()}
    assert weights | biases | wiring.untouched | outside == set(sparse.state_dict())


def test_experts_are_counted_from_their_parameter_and_routers_stay_in_float(sparse: Any) -> None:
    wiring = _wiring(sparse)
    assert wiring.experts == 4  # the config calls them n_routed_experts
    experts = "model.layers.1.mlp.experts"
    assert wiring.expert_parameters == (f"{experts}.gate_up_proj", f"{experts}.down_proj")
    assert f"{experts}.down_proj.3" in wiring.quantizable
    buffer = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert buffer in wiring.untouched
    assert buffer in sparse.state_dict()


def test_no_linears_are_taken_to_read_the_same(dense: Any) -> None:
    assert all(len(group) == 1 for group in merged_linears(_wiring(dense)).values())


def test_every_rotation_is_refused_with_the_reason(dense: Any) -> None:
    for kind in ("r1", "r2", "r3", "r4"):
        with pytest.raises(RotationError, match="not in the architecture table") as caught:
            check_offered([kind], _wiring(dense))
        assert caught.value.hint == "give --rotate none"


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_published_checkpoint_computes_the_same(
    name: str, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    """Names and forms are those that ``save_pretrained`` publishes: experts one by one."""
    from calib.fusing import check_contents
    from calib.network.checkpoint import open_checkpoint

    model = request.getfixturevalue(name)
    model.save_pretrained(tmp_path)
    checkpoint, wiring = open_checkpoint(tmp_path), _wiring(model)
    check_contents(checkpoint, wiring, name)
    fused = fuse(checkpoint, wiring, RotationSet(), dtype=torch.float32)
    assert not fused.norms_folded
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (each(input_ids=ids).logits for each in (materialize(fused), model))
    assert relative_l2(found, wanted) <= 1e-6  # another attention function, nothing else


class _Turned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


class _Scored(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=90.0)


class _Pair(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class _Scaled(nn.Linear):
    """Of its defaults a linear map."""

    def __init__(self, *sizes: int, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__(*sizes, bias=bias)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class _Gained(nn.Linear):
    """One parameter more."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(sizes[1]))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class _Held(nn.Linear):
    """A tensor beside its parameters, which does not become one."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.held = torch.ones(sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.held[0]


class _Checked(nn.Linear):
    """Looks at its own sizes, and takes an argument of its own."""

    def __init__(self, wide: int, *, high: int) -> None:
        super().__init__(wide, high, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (
            super()
            .forward(x.reshape(-1, self.in_features))
            .reshape(*x.shape[:-1], self.out_features)
        )


@pytest.mark.parametrize(
    ("kind", "linear"),
    [
        (_Turned, True),
        (_Scored, False),
        (_Pair, False),
        (_Scaled, True),
        (partial(_Scaled, scale=8.0), False),
        (_Gained, False),
        (_Held, False),
        (lambda wide, high: _Checked(wide, high=high), True),
        (lambda wide, high: _Checked(wide, high=wide), True),
    ],
)
def test_a_subclass_counts_where_it_computes_a_linear_map(kind: Any, linear: bool) -> None:
    with torch.device("meta"):
        module = kind(64, 32)
    assert is_linear_map(module) is linear


def _experts(name: str) -> nn.Module:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    return next(module for module in model.modules() if is_fused(module))


@pytest.mark.parametrize(("name", "known"), [("mixtral", True), ("gpt_oss", False)])
def test_fused_experts_are_known_where_they_compute_the_formula(name: str, known: bool) -> None:
    """Those of gpt_oss have biases, interleaved rows, and a gate that is clamped at 7."""
    assert is_known(_experts(name), "silu") is known


def test_a_clamp_that_only_large_inputs_reach_is_seen() -> None:
    class Clamped(type(_experts("mixtral"))):  # type: ignore[misc]
        def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            result: Tensor = super().forward(x.clamp(max=50.0), chosen, weights)
            return result

    module = _experts("mixtral")
    module.__class__ = Clamped
    assert not is_known(module, "silu")
