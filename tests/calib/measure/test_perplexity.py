"""Perplexity: which token is scored with which context, and the figures against a direct
computation.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.errors import DataError, QuantizationError
from calib.measure.perplexity import (
    compare_logits,
    model_logits,
    perplexity,
    remembered_logits,
    window_spans,
)
from tests.tiny import CONFIGS, make_tiny, token_rows

VOCABULARY = 50


@settings(deadline=None)
@given(st.integers(0, 80), st.integers(1, 20), st.data())
def test_each_token_is_scored_once_with_the_longest_context(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, window))
    contexts: dict[int, int] = {}
    for span in window_spans(length, window, stride):
        assert span.end - span.start <= window
        for target in range(span.first, span.end + 1):
            assert target not in contexts
            assert span.start < target  # at least one token of context
            contexts[target] = target - span.start
    assert sorted(contexts) == list(range(1, length))
    for target, context in contexts.items():
        # everything before the token where that fits, and else no less than the stride leaves
        assert context == target if target <= window else context >= window - stride + 1


def bigram(seed: int) -> Tensor:
    """Logits [VOCABULARY, VOCABULARY] of the next token, given the last one alone."""
    return torch.randn(
        VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def rows_of(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in lengths]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda n: max(n) > 1),
    st.integers(1, 9),
    st.data(),
)
def test_windows_do_not_change_a_model_of_one_token_of_context(
    lengths: list[int], window: int, data: st.DataObject
) -> None:
    """And rows never mix: the expectation looks at pairs inside each row only."""
    table, rows = bigram(0), rows_of(lengths)
    scores = torch.log_softmax(table, -1)
    wanted = [-scores[row[i], row[i + 1]] for row in rows for i in range(len(row) - 1)]
    got = perplexity(
        lambda ids: table[ids], rows, window=window, stride=data.draw(st.integers(1, window))
    )
    assert got.tokens == len(wanted)
    # up to 200 float64 terms, summed in another order
    assert math.isclose(got.nll, float(torch.stack(wanted).mean()), rel_tol=200 * 2.0**-53)
    assert math.isclose(got.value, math.exp(got.nll))


def test_known_values() -> None:
    rows = rows_of([600])  # more than are converted at once
    uniform = perplexity(
        lambda ids: torch.zeros(*ids.shape, VOCABULARY), rows, window=512, stride=100
    )
    assert math.isclose(uniform.value, VOCABULARY, rel_tol=1e-12)  # exp of a rounded log
    hopeless = perplexity(lambda ids: 1e5 * bigram(0)[ids], rows, window=512, stride=512)
    assert hopeless.value == math.inf


def test_comparison_equals_the_definition() -> None:
    p, q, rows = bigram(0), bigram(0) + 0.3 * bigram(1), rows_of([30, 2, 17])
    got = compare_logits(lambda ids: p[ids], lambda ids: q[ids], rows, window=8, stride=3)
    context = torch.cat([row[:-1] for row in rows])
    log_p, log_q = torch.log_softmax(p, -1)[context], torch.log_softmax(q, -1)[context]
    want = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    assert math.isclose(got.kl, float(want), rel_tol=1e-12)  # float64 sums of 50 terms each
    assert got.top1 == float((p.argmax(-1) == q.argmax(-1))[context].double().mean())
    five = q.argsort(-1, descending=True)[:, :5]
    assert got.top5 == float((five == p.argmax(-1, keepdim=True)).any(-1)[context].double().mean())
    assert got.reference == perplexity(lambda ids: p[ids], rows, window=8, stride=3)
    assert got.candidate == perplexity(lambda ids: q[ids], rows, window=8, stride=3)
    assert got.row_tokens == (29, 1, 16)
    for row, own in zip(rows, got.row_kls, strict=True):
        alone = compare_logits(lambda ids: p[ids], lambda ids: q[ids], [row], window=8, stride=3)
        assert alone.kl == own


def test_rows_that_predict_nothing_have_no_figures() -> None:
    p, q, rows = bigram(0), bigram(1), rows_of([1, 9, 1])
    got = compare_logits(lambda ids: p[ids], lambda ids: q[ids], rows, window=8, stride=8)
    assert (got.row_tokens, len(got.row_kls)) == ((8,), 1)


def test_a_model_agrees_with_itself_exactly() -> None:
    table = bigram(0).float()
    got = compare_logits(
        lambda ids: table[ids], lambda ids: table[ids], rows_of([40]), window=16, stride=16
    )
    assert (got.kl, got.top1, got.top5, got.reference) == (0.0, 1.0, 1.0, got.candidate)


def test_small_divergences_are_resolved() -> None:
    """KL of a perturbation e is about e² / 2 times a variance: 1e-12 here, far below float32
    rounding of the terms.
    """
    p = bigram(0)
    q = p + 1e-6 * bigram(1)
    got = compare_logits(
        lambda ids: p[ids], lambda ids: q[ids], rows_of([200]), window=64, stride=64
    )
    assert 1e-13 < got.kl < 1e-11


def test_refusals() -> None:
    table = bigram(0)
    for window, stride in ((4, 5), (4, 0), (0, 0)):
        with pytest.raises(DataError, match="stride"):
            perplexity(lambda ids: table[ids], rows_of([9]), window=window, stride=stride)
    with pytest.raises(DataError, match="no token to score"):
        perplexity(lambda ids: table[ids], rows_of([1]), window=4, stride=4)
    with pytest.raises(DataError, match="logits"):
        perplexity(lambda ids: table[ids][0], rows_of([9]), window=4, stride=4)
    with pytest.raises(DataError, match="vocabulary of 50, the candidate one of 49"):
        compare_logits(
            lambda ids: table[ids],
            lambda ids: table[ids][..., :49],
            rows_of([9]),
            window=4,
            stride=4,
        )
    with pytest.raises(QuantizationError, match="NaN or Inf"):
        perplexity(lambda ids: table[ids] / 0, rows_of([9]), window=4, stride=4)


def test_a_transformers_model_is_scored_with_its_real_context() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import, and used here only

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model, (row,) = LlamaForCausalLM(config).eval(), rows_of([20])
    got = perplexity(model_logits(model), [row], window=64, stride=64)
    with torch.no_grad():
        loss = model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss
    # the model's own loss is a float32 mean of 19 terms
    assert math.isclose(got.nll, float(loss), rel_tol=19 * 2.0**-24)
    # context matters
    assert perplexity(model_logits(model), [row], window=5, stride=1).nll != got.nll


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_a_model_that_is_remembered_runs_its_decoder_once_over_the_same_tokens(name: str) -> None:
    """gemma2 does something to its logits behind the head."""
    model = make_tiny(CONFIGS[name]()).model()
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    first = next(module for module in model.base_model.modules() if not list(module.children()))
    first.register_forward_hook(count)
    remembered = remembered_logits(model)
    rows = [row.unsqueeze(0) for row in token_rows((5, 9))]
    expected = [model_logits(model)(ids) for ids in rows]
    assert passes == len(rows)
    for _ in range(3):
        for ids, logits in zip(rows, expected, strict=True):
            assert torch.equal(remembered(ids), logits)
    assert passes == 2 * len(rows)
    assert "forward" not in vars(model.base_model)
