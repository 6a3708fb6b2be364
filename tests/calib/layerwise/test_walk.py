"""The walk computes what the whole model computes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from calib.architectures.groups import reading_groups
from calib.fusing import FusedModel, materialize
from calib.layerwise import Block, CalibrationRunner
from calib.network.observe_experts import experts_as_modules
from tests.calib.layerwise.layerwise_support import (
    Rounded,
    Rtn,
    batches,
    lazily,
    linear_names,
    rounded,
    walk,
)
from tests.tiny import CONFIGS, Tiny, make_tiny


@torch.no_grad()
def inputs_in_the_whole_model(
    fused: FusedModel,
    names: list[str],
    computing: dict[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, list[Tensor]]:
    """What the modules ``names`` read, by batch, and the linears in ``computing`` replaced by
    functions.
    """
    model = materialize(fused)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    with experts_as_modules(model, names):
        for name, function in (computing or {}).items():
            model.get_submodule(name).forward = function
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: seen[name].append(args[0])
            )
        for batch in batches():
            model(**batch.model_inputs("cpu"), use_cache=False)
    return seen


def modules_in_the_whole_model(fused: FusedModel, names: list[str]) -> dict[str, nn.Module]:
    model = materialize(fused)
    with experts_as_modules(model, names):
        return {name: model.get_submodule(name) for name in names}


def assert_same(left: dict[str, list[Tensor]], right: dict[str, list[Tensor]]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert len(left[name]) == len(right[name]) > 0
        assert all(torch.equal(a, b) for a, b in zip(left[name], right[name], strict=True)), name


class Watching(Rtn):
    """Keeps the hidden states that enter each block as well."""

    def calibrate(self, block: Block, names: Any, run: Callable[..., None]) -> dict[str, Rounded]:
        self.inputs[block.name] = []
        entering = block.module.register_forward_pre_hook(
            lambda _, args: self.inputs[block.name].append(args[0])
        )
        found = super().calibrate(block, names, run)
        entering.remove()
        return found


def test_every_block_and_linear_reads_what_it_reads_in_the_whole_model(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Bit for bit: the same operations on the same batches."""
    fused = lazily(tiny)
    calibrator = Watching()
    CalibrationRunner(fused, batches(), calibrator, tmp_path).layerwise_calibration()
    names = linear_names(fused)
    names += [fused.wiring.block(layer) for layer in range(fused.config.num_hidden_layers)]
    assert_same(calibrator.inputs, inputs_in_the_whole_model(fused, names))


def test_shards_hold_the_whole_quantized_model(tiny: Tiny, tmp_path: Path) -> None:
    """Every scale is that of the whole model, and every other tensor is the fused one."""
    fused = lazily(tiny)
    walk(fused, tmp_path)
    linears = linear_names(fused)
    seen = inputs_in_the_whole_model(fused, linears)
    experts = fused.wiring.expert_parameters
    expected: dict[str, Tensor] = {
        key: tensor for key, tensor in fused.state.items() if key not in experts
    }
    for name, linear in modules_in_the_whole_model(fused, linears).items():
        for part, tensor in Rtn().tensors(rounded(linear, seen[name])).items():
            expected[f"{name}.{part}"] = tensor
    paths = sorted((tmp_path / "shards").iterdir())
    found = {key: tensor for path in paths for key, tensor in load_file(path).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert all(path.match("quantized_model*.safetensors") for path in paths)


def test_groups_are_in_topological_order_and_read_the_same_tensor(tiny: Tiny) -> None:
    fused = lazily(tiny, [])
    groups = [
        group
        for layer in range(fused.config.num_hidden_layers)
        for group in reading_groups(fused.wiring, layer)
    ]
    assert [name for group in groups for name in group] == linear_names(fused)
    # Experts read some tokens each, and one of them is run after the other.
    groups = [group for group in groups if ".experts." not in group[0]]
    model, ran, read = materialize(fused), [], {}

    def look(module: torch.nn.Module, args: tuple[Tensor]) -> None:
        ran.append(names[module])
        read[names[module]] = args[0]

    names = {model.get_submodule(name): name for group in groups for name in group}
    for module in names:
        module.register_forward_pre_hook(look)
    model(batches()[0].input_ids)
    for group in groups:
        assert all(read[name] is read[group[0]] for name in group)
    for one, other in combinations([group[0] for group in groups], 2):
        if read[one] is read[other]:  # attention and MLP side by side behind one norm
            blocks = {fused.wiring.by_name[name].layer for name in (one, other)}
            assert len(blocks) == 1
            assert one.rpartition(".")[0] != other.rpartition(".")[0]
    # A layer with neither attention nor MLP first (parallel residuals) may run its groups in
    # another order.
    if not getattr(fused.config, "use_parallel_residual", False):
        order = {name: position for position, group in enumerate(groups) for name in group}
        assert [order[name] for name in ran] == sorted(order[name] for name in ran)


def check_asymmetric_walk(tiny: Tiny, w_quant: bool, a_quant: bool, work: Path) -> None:
    """Once all is quantized, every linear of the whole model reads exactly what it was calibrated
    on.
    """
    fused = lazily(tiny)
    calibrator = walk(fused, work, {"asym": True, "w_quant": w_quant, "a_quant": a_quant})
    linears = linear_names(fused)
    functions = {}
    for name, linear in modules_in_the_whole_model(fused, linears).items():
        result = rounded(linear, calibrator.inputs[name])
        functions[name] = calibrator.replacement(result, linear, w_quant, a_quant)
    assert_same(calibrator.inputs, inputs_in_the_whole_model(fused, linears, functions))
    plain = inputs_in_the_whole_model(fused, linears)
    assert torch.equal(calibrator.inputs[linears[0]][0], plain[linears[0]][0])
    assert torch.equal(calibrator.inputs[linears[-1]][0], plain[linears[-1]][0]) == (
        not w_quant and not a_quant
    )


def test_asymmetric_walk_feeds_each_linear_what_the_quantized_model_feeds_it(
    tiny: Tiny, tmp_path: Path
) -> None:
    check_asymmetric_walk(tiny, True, True, tmp_path)


@pytest.mark.parametrize(("w_quant", "a_quant"), [(True, False), (False, True), (False, False)])
def test_weights_and_activations_are_rounded_separately(
    llama: Tiny, w_quant: bool, a_quant: bool, tmp_path: Path
) -> None:
    check_asymmetric_walk(llama, w_quant, a_quant, tmp_path)


def test_hidden_states_beyond_the_budget_change_nothing(llama: Tiny, tmp_path: Path) -> None:
    fused = lazily(llama)
    for max_memory in (0, 4000, 1 << 20):
        for resumable in (True, False):
            work = tmp_path / f"{max_memory}-{resumable}"
            walk(fused, work, max_memory=max_memory, resumable=resumable)
            assert not list(work.glob("hidden-*"))
    found = {
        tuple(p.read_bytes() for p in sorted((w / "shards").iterdir())) for w in tmp_path.iterdir()
    }
    assert len(found) == 1


def test_a_bfloat16_model_is_walked_in_bfloat16(llama: Tiny, tmp_path: Path) -> None:
    fused = lazily(llama, dtype=torch.bfloat16)
    calibrator = walk(fused, tmp_path, max_memory=0)
    names = linear_names(fused)
    assert_same(calibrator.inputs, inputs_in_the_whole_model(fused, names))
    assert calibrator.inputs[names[-1]][0].dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "opt-nobias"])
def test_a_linear_that_took_the_bias_of_its_norm(name: str, tmp_path: Path) -> None:
    tiny = make_tiny(CONFIGS[name]())
    gain = next(
        key for key in tiny.state if key.endswith(("ln_1.weight", "self_attn_layer_norm.weight"))
    )
    final = next(
        key
        for key in tiny.state
        if key.endswith(("ln_f.weight", "decoder.final_layer_norm.weight"))
    )
    for key in (gain, final):
        tiny.state[key][7] = 1e-9
    fused = lazily(tiny)
    calibrator = walk(fused, tmp_path)
    assert fused.refusals
    assert "lm_head.bias" in fused.state
    assert_same(calibrator.inputs, inputs_in_the_whole_model(fused, linear_names(fused)))


def test_without_batches_nothing_runs(llama: Tiny, tmp_path: Path) -> None:
    calibrator = Rtn()
    runner = CalibrationRunner(lazily(llama), [], calibrator, tmp_path)
    runner.layerwise_calibration()
    assert len(runner.shards.paths()) == llama.config.num_hidden_layers + 3
    assert not any(calibrator.inputs.values())


def test_the_model_is_never_whole_in_memory(llama: Tiny, tmp_path: Path) -> None:
    """While a block is calibrated, its own tensors are the only real parameters of the model."""
    runner: CalibrationRunner[Rounded]
    real: list[set[str]] = []

    class Looking(Rtn):
        def calibrate(
            self, block: Block, names: Any, run: Callable[..., None]
        ) -> dict[str, Rounded]:
            model = runner._flow.model
            real.append({key for key, tensor in model.named_parameters() if not tensor.is_meta})
            assert all(key.startswith(f"{block.name}.") for key in real[-1])
            return super().calibrate(block, names, run)

    runner = CalibrationRunner(lazily(llama), batches(), Looking(), tmp_path)
    runner.layerwise_calibration()
    assert [len(names) for names in real] == [9, 9]
    assert all(tensor.is_meta for tensor in runner._flow.model.parameters())
