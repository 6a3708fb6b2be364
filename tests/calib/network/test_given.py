"""Model objects are what their config describes, or are refused by the module that differs."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from calib.errors import UnsupportedModelError
from calib.network.given import check_given, unwrapped
from tests.tiny import CONFIGS, SIZES


def _made(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def llama() -> Any:
    return _made(CONFIGS["llama"]())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_family_is_what_its_config_describes(config: Callable[[], Any]) -> None:
    made = config()
    if getattr(made, "layer_norm_elementwise_affine", True) is False:
        pytest.skip("transformers itself cannot initialise it")
    model = _made(made)
    model(torch.tensor([[3, 4, 5]]))
    check_given(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3", "gpt_neox", "qwen3_moe"])
def test_a_model_loaded_in_another_dtype(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    _made(CONFIGS[name]()).save_pretrained(tmp_path)
    check_given(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))


def _pad_token(model: Any) -> None:
    model.config.pad_token_id = 2


def _more_tokens(model: Any) -> None:
    model.resize_token_embeddings(model.config.vocab_size + 8)


def _dropout(model: Any) -> None:
    for key in ("attention_dropout", "attn_pdrop", "dropout", "layerdrop", "router_jitter_noise"):
        if hasattr(model.config, key):
            setattr(model.config, key, 0.3)


@pytest.mark.parametrize("edit", [_pad_token, _more_tokens, _dropout])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "mixtral"])
def test_what_no_logit_depends_on_may_differ(name: str, edit: Callable[[Any], None]) -> None:
    model = _made(CONFIGS[name]())
    edit(model)
    check_given(model)


def _half(model: Any) -> None:
    model.half()


def _activation(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.GELU()


def _frequencies(model: Any) -> None:
    model.model.rotary_emb.inv_freq.mul_(0.5)


def _theta(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}


def _scaling(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.1


def _added(model: Any) -> None:
    model.model.layers[0].self_attn.q_proj.adapter = nn.Linear(48, 48)


def _hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)


def _hook_with_keywords(model: Any) -> None:
    def doubled(module: Any, inputs: Any, keywords: Any, output: Any) -> Any:
        return 2 * output[0], *output[1:]

    model.model.layers[0].self_attn.register_forward_hook(doubled, with_kwargs=True)


def _pre_hook(model: Any) -> None:
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def _whole_hook(model: Any) -> None:
    model.register_forward_hook(lambda module, inputs, output: output)


def _forward(model: Any) -> None:
    norm = model.model.norm
    norm.forward = MethodType(lambda module, states: 2 * states, norm)


def _whole_forward(model: Any) -> None:
    model.forward = MethodType(type(model).forward, model)


def _head(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_half, r"rotary_emb\.inv_freq is torch\.float16, rounded by \.to\(\) or \.half\(\)"),
        (_activation, r"layers\.1\.mlp\.act_fn is GELU, expected SiLU"),
        (_frequencies, r"rotary_emb\.inv_freq has other values"),
        (_theta, r"rotary_emb\.inv_freq has other values"),
        (_scaling, r"layers\.0\.self_attn\.scaling is .*, expected"),
        (_epsilon, r"model\.norm\.variance_epsilon is 0\.1, expected"),
        (_added, r"a module model\.layers\.0\.self_attn\.q_proj\.adapter \(Linear\) beside"),
        (_hook, r"layers\.1\.mlp has a forward hook \(_hook\.<locals>\.<lambda>\)"),
        (_hook_with_keywords, r"layers\.0\.self_attn has a forward hook \(.*doubled\)"),
        (_pre_hook, r"lm_head has a forward pre-hook"),
        (_whole_hook, r": it has a forward hook"),
        (_forward, r"model\.norm\.forward was replaced"),
        (_whole_forward, r": it\.forward was replaced"),
        (_head, r"lm_head is Sequential, expected Linear"),
    ],
)
def test_what_differs_is_named(llama: Any, edit: Callable[[Any], None], said: str) -> None:
    model = deepcopy(llama)
    edit(model)
    with pytest.raises(UnsupportedModelError, match=said) as caught:
        check_given(model)
    assert "from_pretrained" in str(caught.value.hint)


def test_hooks_of_the_library_itself_pass(llama: Any) -> None:
    model = deepcopy(llama)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(torch.tensor([[3, 4, 5]]), output_hidden_states=True, output_attentions=True)
    assert any(module._forward_hooks for module in model.modules())
    check_given(model)


def test_hooks_that_see_gradients_alone_pass(llama: Any) -> None:
    model = deepcopy(llama)
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: None)
    check_given(model)


def test_a_classifier_is_named() -> None:
    config = transformers.LlamaConfig(**SIZES, num_labels=2)
    with pytest.raises(UnsupportedModelError, match="it is LlamaForSequenceClassification"):
        check_given(transformers.LlamaForSequenceClassification(config))


def test_fake_quantizers_are_named(llama: Any) -> None:
    quantizer = type("FakeQuantized", (nn.Linear,), {"__module__": "modelopt.torch.quantization"})
    model = deepcopy(llama)
    model.model.layers[0].mlp.up_proj = quantizer(48, 88, bias=False)
    with pytest.raises(UnsupportedModelError, match="up_proj is FakeQuantized") as caught:
        check_given(model)
    assert "give the float model" in str(caught.value.hint)


def test_wrappers_are_taken_off(llama: Any) -> None:
    assert unwrapped(llama) is llama
    assert unwrapped(torch.compile(llama)) is llama
    assert unwrapped(nn.DataParallel(llama)) is llama


def test_compiled_modules_inside_are_taken_off_and_the_model_is_left_alone(llama: Any) -> None:
    model = deepcopy(llama)
    model.model.layers[1] = torch.compile(model.model.layers[1])
    plain = unwrapped(model)
    assert list(plain.state_dict()) == list(llama.state_dict())
    assert any("_orig_mod" in name for name in model.state_dict())
    check_given(plain)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert {parameter.data_ptr() for parameter in plain.parameters()} == shared
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(plain(ids).logits, llama(ids).logits)
