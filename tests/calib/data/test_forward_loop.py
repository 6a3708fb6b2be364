"""Forward loops: what they run, what they count, and whom they blame."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from calib.data.batches import Batch, length_batches
from calib.data.forward_loop import create_forward_loop, forward_loop_over
from calib.errors import DataError, QuantizationError


def characters(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
    """A tokenizer of characters, with a BOS."""
    assert add_special_tokens
    assert not verbose
    return {"input_ids": [1, *(ord(character) for character in text)]}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config)


class Watch:
    """Remembers what the embedding of a model was given."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.ids: list[Tensor] = []
        model.model.embed_tokens.register_forward_pre_hook(
            lambda module, args: self.ids.append(args[0])
        )


def test_runs_the_rows_of_a_file_without_padding(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("abc\ndef\nlonger than sixteen characters\nxyz\n")
    steps: list[int] = []
    loop = create_forward_loop(
        model,
        str(file),
        characters,
        "cpu",
        2,
        10,
        seqlen=512,
        seed=0,
        progress=lambda s, done, total: steps.append(done),
    )
    watch = Watch(model)
    model.train()
    loop(model)
    # 16: the model's positions
    assert [tuple(ids.shape) for ids in watch.ids] == [(1, 16), (2, 4), (1, 4)]
    assert (loop.rows, loop.tokens) == (4, 28)
    assert steps == [0, 1, 2, 3]
    assert model.training
    loop(model)  # a calibration algorithm may run the loop more than once
    assert len(watch.ids) == 6


def test_the_sample_is_seeded_and_bounded(model: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"text {i}" for i in range(50)))

    def ids(seed: int) -> list[list[int]]:
        watch = Watch(model)
        create_forward_loop(model, str(file), characters, "cpu", 1, 5, seed=seed)(model)
        return [batch[0].tolist() for batch in watch.ids]

    first = ids(0)
    assert len(first) == 5
    assert ids(0) == first
    assert ids(1) != first


def test_an_empty_loop_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no calibration batches"):
        forward_loop_over([])
    with pytest.raises(DataError, match="does not exist"):
        create_forward_loop(model, str(tmp_path / "none.txt"), characters, "cpu", 1, 1)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.embed_tokens",
        "lm_head",
    ],
)
def test_the_first_module_that_is_not_finite_is_named(model: LlamaForCausalLM, name: str) -> None:
    module = model.get_submodule(name)
    with torch.no_grad():
        next(module.parameters())[:] = float("nan")
    loop = forward_loop_over(length_batches([torch.arange(5), torch.arange(7)], 1))
    with pytest.raises(QuantizationError, match=f"output of '{name}' holds NaN or Inf") as caught:
        loop(model)
    assert caught.value.hint is not None
    assert "checkpoint is damaged" in caught.value.hint
    assert all(not part._forward_hooks for part in model.modules())


def test_an_overflow_is_told_from_damaged_weights(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e9)
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(QuantizationError, match=r"'model\.layers\.0\.mlp\.down_proj'") as caught:
        forward_loop_over(length_batches([torch.arange(5)], 1))(model)
    assert caught.value.hint is not None
    assert "bfloat16" in caught.value.hint


class NanForZero(nn.Module):
    """A model whose logits are NaN wherever the token is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids: Tensor, use_cache: bool, attention_mask: Tensor | None = None
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.where(input_ids == 0, torch.nan, 1.0).unsqueeze(-1))


def test_without_the_head_the_body_runs_and_is_checked(model: LlamaForCausalLM) -> None:
    rows = [torch.arange(9), torch.arange(1, 10)]
    seen: list[Tensor] = []
    head = forward_loop_over(length_batches(rows, 2))
    body = forward_loop_over(length_batches(rows, 2), head=False)
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    norms: list[Tensor] = []
    final = model.model.norm.register_forward_hook(lambda _m, _a, output: norms.append(output))
    head(model)
    body(model)
    assert len(seen) == 1
    assert torch.equal(norms[0], norms[1])
    handle.remove()
    final.remove()

    with torch.no_grad():
        model.model.norm.weight.fill_(torch.inf)
    with pytest.raises(QuantizationError, match=r"model.norm|'norm'"):
        body(model)


def test_what_stands_at_a_pad_position_means_nothing() -> None:
    ids = torch.tensor([[5, 6, 0], [5, 6, 7]])
    forward_loop_over([Batch(ids, (0, 1), (ids != 0).long())])(NanForZero())
    with pytest.raises(QuantizationError, match="output of 'the model' holds NaN"):
        forward_loop_over([Batch(ids, (0, 1))])(NanForZero())


def test_modelopt_calibrates_with_it(model: LlamaForCausalLM) -> None:
    """The amax that ModelOpt finds is the largest absolute input over exactly the rows of the
    loop.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on import and on use: other people's deprecations
        mtq = pytest.importorskip("modelopt.torch.quantization")
        rows = [torch.randint(0, 128, (length,)) for length in (5, 9, 9, 3)]
        largest = 0.0

        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal largest
            largest = max(largest, float(args[0].abs().max()))

        handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(look)
        loop = forward_loop_over(length_batches(rows, 2))
        loop(model)
        handle.remove()
        quantized = mtq.quantize(model, mtq.INT8_DEFAULT_CFG, loop)
    assert float(quantized.model.layers[1].mlp.up_proj.input_quantizer.amax) == largest
