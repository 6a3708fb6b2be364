"""``--dry-run``: sizes from headers alone, refusals that the run itself would make, and estimates
that scale.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
from cli_support import LLAMA_CONFIG, llama_shapes, write_llama, write_safetensors

from calib.architectures.lookup import architecture_named
from calib.errors import BackendError, CheckpointError, QuantizationError, UnsupportedModelError
from calib.schemes import INT8, PerChannel, TensorScheme, tensor_scheme_to_dict
from exporter.planning.artifact import planned_artifact
from exporter.planning.headers import CheckpointHeaders, read_headers
from exporter.planning.plan import Plan, plan
from exporter.planning.stages import Goal, Stage
from exporter.recipe import Recipe, load_recipe
from exporter.run.options import RunOptions
from tests.census.configs import seeded_model, tiny_config

BLOCK_PARAMETERS = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 128 * 64)
EMBEDDING = 100 * 64
NORMS = 5 * 64
CHANNELS = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)


def planned(
    folder: Path, *, goal: Goal = "export", options: RunOptions | None = None, **overrides: object
) -> Plan:
    recipe = load_recipe(
        None, {"model": str(folder), "dtype": "float32", "device": "cpu", **overrides}
    )
    return plan(recipe, options or RunOptions(output=Path("out")), goal=goal)


def stages(of: Plan) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in of.stages}


def test_sizes_follow_from_the_headers(tmp_path: Path) -> None:
    found = planned(write_llama(tmp_path / "model"))
    assert found.quantized_parameters == BLOCK_PARAMETERS
    assert found.parameters == BLOCK_PARAMETERS + 2 * EMBEDDING + NORMS
    assert found.bytes_before == 2 * found.parameters
    # int8 weights, one float32 scale an output channel, everything else in float32
    assert found.bytes_after == BLOCK_PARAMETERS + 4 * CHANNELS + 4 * (2 * EMBEDDING + NORMS)


def test_shards_count_as_one_model(tmp_path: Path) -> None:
    one = planned(write_llama(tmp_path / "one"))
    three = planned(write_llama(tmp_path / "three", shards=3))
    assert (one.parameters, one.bytes_before, one.bytes_after) == (
        three.parameters,
        three.bytes_before,
        three.bytes_after,
    )


def test_a_tied_head_is_stored_separately_afterwards(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "tied", tie_word_embeddings=True)
    shapes = llama_shapes()
    del shapes["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", shapes)
    assert planned(folder).bytes_after == planned(write_llama(tmp_path / "untied")).bytes_after


@pytest.mark.parametrize("tied", [False, True])
def test_large_tables_are_planned_as_the_run_quantizes_them(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_llama(tmp_path / "model", tie_word_embeddings=tied)
    shapes = llama_shapes()
    if tied:
        del shapes["lm_head.weight"]
    write_safetensors(folder / "model.safetensors", shapes)
    float_tables = planned(folder)
    monkeypatch.setattr("exporter.run.tables.LEAST_ELEMENTS", 0)
    monkeypatch.setattr("exporter.run.tables.LEAST_SHARE", 0.1)
    found = planned(folder)
    # of a tied table both copies are quantized, and it is one table all the same
    assert found.quantized_parameters == BLOCK_PARAMETERS + (1 if tied else 2) * EMBEDDING
    assert found.quantized_parameters <= found.parameters
    assert float_tables.bytes_after - found.bytes_after == 2 * (3 * EMBEDDING - 4 * 100)
    assert "lm_head: int8-weight-only" in found.recipe
    assert "lm_head" not in planned(folder, goal="calibrate").recipe


def test_four_bit_weights_take_half_a_byte_and_one_scale_a_block(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    found = planned(folder, **{"scheme": "int4-weight-only", "weights.block_size": 128})
    # no row is longer than a block of 128 here, so there is one scale a row
    floats = 4 * (2 * EMBEDDING + NORMS)
    assert found.bytes_after == BLOCK_PARAMETERS // 2 + 4 * CHANNELS + floats
    # of a narrow model they are of 32 unless the recipe says so, and every width is a multiple
    found = planned(folder, scheme="int4-weight-only")
    assert "block_size: 32" in found.recipe
    assert found.bytes_after == BLOCK_PARAMETERS // 2 + 4 * BLOCK_PARAMETERS // 32 + floats
    # what is calibrated for no target keeps the blocks of the scheme, and so does what fixes them
    assert "block_size: null" in planned(folder, scheme="int4-weight-only", goal="calibrate").recipe
    assert "block_size: null" in planned(folder, scheme="w4a8").recipe


def test_the_stages_are_those_of_the_settings(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    everything = [
        "start",
        "load",
        "prefix",
        "capture",
        "train R1",
        "train R2",
        "fuse",
        "calibrate",
        "gate",
        "write",
        "verify",
    ]
    assert list(stages(planned(folder))) == everything
    plain = planned(folder, rotate="none", options=RunOptions(output=Path("out"), verify=False))
    assert list(stages(plain)) == ["start", "load", "prefix", "fuse", "calibrate", "write"]
    assert list(stages(planned(folder, rotate="r2", prefix="none"))) == [
        "start", "load", "capture", "train R2", "fuse", "calibrate", "write", "verify",
    ]  # fmt: skip
    assert "capture" not in stages(planned(folder, rotate="r4"))
    assert list(stages(planned(folder, goal="capture"))) == ["start", "load", "prefix", "capture"]
    dynamic = planned(folder, goal="calibrate", rotate="none", scheme="int8-dynamic")
    assert list(stages(dynamic)) == ["start", "load", "fuse", "calibrate"]
    assert "prefix" not in stages(planned(folder, goal="rotate"))
    wanted = planned(folder, goal="calibrate", rotate="none", scheme="int8-dynamic", prefix=1)
    assert "prefix" in stages(wanted)


def test_what_is_reused_costs_no_time(tmp_path: Path) -> None:
    options = RunOptions(output=Path("out"), from_capture=tmp_path)
    assert stages(planned(write_llama(tmp_path / "model"), options=options))["capture"] == 0
    assert stages(planned(tmp_path / "model", scheme="int8-weight-only"))["calibrate"] == 0


def test_time_grows_with_the_rows_and_the_total_is_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.planning.plan.matmul_flops", lambda: 1e10)
    folder = write_llama(tmp_path / "model")
    few, many = (planned(folder, **{"calibration.nsamples": rows}) for rows in (16, 64))
    assert stages(many)["capture"] == pytest.approx(4 * stages(few)["capture"])
    assert many.seconds == pytest.approx(sum(stages(many).values()))


@pytest.mark.parametrize(("seqlen", "proof"), [(16, 2048), (100, 2100), (128, 2048)])
def test_parity_proves_on_few_rows_and_scores_on_all(
    seqlen: int, proof: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.planning.plan.matmul_flops", lambda: 1e10)
    folder = write_llama(tmp_path / "model")

    def verify(rows: int) -> Stage:
        settings = {"evaluation.nsamples": rows, "calibration.seqlen": seqlen}
        return next(each for each in planned(folder, **settings).stages if each.name == "verify")

    one, many, more = verify(1), verify(256), verify(512)
    assert f"rungs 1 and 2 on {seqlen:,} tokens, rung 3 on up to {seqlen:,}" in one.detail
    assert f"rungs 1 and 2 on {proof:,} tokens, rung 3 on up to {256 * seqlen:,}" in many.detail
    # in passes over one row: 7 and 2 of it; beyond the proof's rows, only rung 3 grows
    a_pass = one.seconds / 9
    assert many.seconds == pytest.approx((7 * proof / seqlen + 2 * 256) * a_pass)
    assert more.seconds - many.seconds == pytest.approx(2 * 256 * a_pass)


def test_rows_are_never_longer_than_the_model_takes(tmp_path: Path) -> None:
    found = planned(write_llama(tmp_path / "model"), **{"calibration.seqlen": 4096})
    assert any("rows of 128 tokens" in stage.detail for stage in found.stages)


def test_the_plan_carries_the_complete_recipe(tmp_path: Path) -> None:
    found = planned(write_llama(tmp_path / "model"), seed=7)
    saved = tmp_path / "recipe.yaml"
    saved.write_text(found.recipe)
    assert load_recipe(saved).seed == 7
    assert json.loads(json.dumps(found.as_dict()))["seconds"] == pytest.approx(found.seconds)


def test_an_artifact_is_only_written_and_verified(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "artifact")
    (folder / "model.safetensors").rename(folder / "quantized_model.safetensors")
    (folder / "config.json").unlink()  # an artifact's manifest holds the config
    int8 = tensor_scheme_to_dict(TensorScheme(INT8, PerChannel(0)))
    linears = {"model.layers.0.mlp.down_proj": {"weight": int8, "input": None}}
    manifest = {"config": LLAMA_CONFIG, "linears": linears, "cache": None}
    (folder / "quantized_model.json").write_text(json.dumps(manifest))
    (folder / "rotations.json").write_text(json.dumps({"rotations": []}))
    options = RunOptions(output=Path("out"), from_artifact=folder)
    assert list(stages(planned(folder, options=options))) == ["start", "write", "verify"]
    (folder / "quantized_model.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"quantized_model\.json' is damaged: KeyError: 'config'"
    ):
        planned(folder, options=options)
    (folder / "quantized_model.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no quantized_model\.json") as caught:
        planned(folder, options=options)
    assert caught.value.hint == "give what 'rotq calibrate' wrote to --from-artifact"


def test_every_target_has_its_own_dtype_and_bytes(
    tmp_path: Path, plugins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plugins)
    folder = write_llama(tmp_path / "model")  # bfloat16

    def bytes_after(*targets: str, dtype: str = "auto", **settings: object) -> int:
        found = planned(
            folder, backend="stub", target=list(targets), dtype=dtype, scheme="float", **settings
        )
        assert found.quantized_parameters == 0
        return found.bytes_after

    one, two, own = (bytes_after(target) for target in ("one", "two", "own"))
    assert one == 2 * two == 2 * own == 4 * (BLOCK_PARAMETERS + 2 * EMBEDDING + NORMS)
    assert bytes_after("one", "two", dtype="bfloat16") == 2 * two
    with pytest.raises(BackendError, match="one in float32, two in float16") as caught:
        bytes_after("one", "two")
    assert "--from-artifact" in str(caught.value.hint)


def test_a_plan_refuses_and_warns_as_the_run_would(
    tmp_path: Path, plugins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plugins)
    folder = write_llama(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    found = planned(
        folder, backend="stub", target="two", scheme="int8", overrides={"*.0.mlp.*": "w4a8"}
    )
    assert found.warnings == (
        (
            "target 'two': 3 linears with int4 weights in blocks of 128, int8 inputs per tensor:"
            " int4 weights are unpacked first"
        ),
    )
    with pytest.raises(BackendError, match="cannot express 'lm_head': no float8 kernels"):
        planned(folder, backend="stub", target="one", overrides={"lm_head": "float8"})
    with pytest.raises(
        BackendError, match="'two' of backend 'stub' cannot express R4: it has no place for one"
    ):
        planned(folder, backend="stub", target="two", rotate="r1,r4")
    planned(folder, backend="stub", target="two", rotate="auto")
    odd = write_llama(tmp_path / "odd", vocab_size=101)
    with pytest.raises(BackendError, match="cannot express this model: its vocabulary is odd"):
        planned(odd, backend="stub")


@pytest.mark.parametrize("goal", ["export", "calibrate"])
def test_an_override_that_matches_nothing_is_refused_as_the_run_would(
    goal: Goal, tmp_path: Path
) -> None:
    folder = write_llama(tmp_path / "model")
    for pattern in ("*.gate", "model.layers.2.*", "model.norm", "*.lm_head"):
        with pytest.raises(
            QuantizationError, match=re.escape(f"the override '{pattern}' matches no linear")
        ) as caught:
            planned(folder, goal=goal, overrides={pattern: "float"})
        assert "linears are called like model.layers.0." in str(caught.value.hint)
    for pattern in ("*.gate_proj", "model.layers.1.*", "lm_head", "model.embed_tokens"):
        planned(folder, goal=goal, overrides={pattern: "float"})


def test_overrides_match_the_names_of_the_run_whatever_the_file_calls_them() -> None:
    """GPT-2 is stored without its base prefix."""
    stored = [f"h.{layer}.attn.c_attn" for layer in range(2)]
    checkpoint = CheckpointHeaders("here", {"model_type": "gpt2"}, ())
    family = architecture_named("gpt2")
    recipe = load_recipe(None, {"overrides": {"transformer.h.0.*": "float"}})
    assert list(planned_artifact(recipe, checkpoint, family, stored).linears) == stored[1:]
    with pytest.raises(QuantizationError, match="matches no linear"):
        planned_artifact(
            load_recipe(None, {"overrides": {"transformer.h.2.*": "float"}}),
            checkpoint,
            family,
            stored,
        )


def test_a_family_that_is_not_in_the_table_is_planned_as_it_runs(tmp_path: Path) -> None:
    seeded_model(tiny_config("persimmon")).save_pretrained(tmp_path / "model")
    found = planned(tmp_path / "model", overrides={"*.0.self_attn.dense": "float"})
    assert found.quantized_parameters > 0
    # nothing is rotated, and no prefix is looked for, though limits are fixed beforehand
    assert list(stages(found)) == ["start", "load", "fuse", "calibrate", "write", "verify"]
    with pytest.raises(QuantizationError, match="matches no linear"):
        planned(tmp_path / "model", overrides={"*.q_proj": "float"})


def test_the_scheme_float_trains_and_compares_nothing(tmp_path: Path) -> None:
    found = planned(write_llama(tmp_path / "model"), scheme="float")
    assert list(stages(found)) == ["start", "load", "fuse", "calibrate", "write", "verify"]


def sets_in(plan: Plan) -> str:
    """What the stage says of the sets that the gate compares."""
    return next((stage.detail for stage in plan.stages if stage.name == "gate"), "none")


def test_as_many_sets_are_planned_as_the_run_would_compare(
    tmp_path: Path, plugins: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(plugins)
    folder = write_llama(tmp_path / "model")
    assert "the 4 sets and" in sets_in(planned(folder))
    # target 'two' has no place for R4; the norms of Gemma-2 leave no R1
    assert "the 3 sets and" in sets_in(planned(folder, backend="stub", target="two"))
    gemma = planned(write_llama(tmp_path / "gemma", model_type="gemma2"))
    assert "the 4 sets and" in sets_in(gemma)
    assert "train R2" in stages(gemma)
    assert "train R1" not in stages(gemma)
    # what comes from files is not trained, so nothing stands in for training
    assert "the 3 sets and" in sets_in(planned(folder, **{"rotation.files": ["r1.pt", "r2.pt"]}))
    assert sets_in(planned(folder, rotate="r1")) == "none"


def test_the_embedded_model_can_be_planned() -> None:
    found = plan(Recipe(dtype="float32", device="cpu"), RunOptions(output=Path()))
    assert found.model_type == "llama"
    assert found.output is None
    assert found.bytes_after < found.bytes_before


def test_a_model_that_is_not_supported_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"'mamba' is not supported: .*linear_attention"
    ):
        planned(write_llama(tmp_path / "model", model_type="mamba"))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"lacks the weight file 'model-00002-of-00002.safetensors'"
    ):
        planned(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 10**12) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"nope",
    ],
    ids=["empty", "shorter than the length", "absurd length", "not an object", "not JSON"],
)
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_llama(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        planned(folder)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        planned(folder)


def test_headers_agree_with_the_library_that_reads_them(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    folder = write_llama(tmp_path / "model")
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        names = file.keys()
        expected = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    assert {tensor.name: tensor.shape for tensor in read_headers(str(folder)).tensors} == expected


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./nowhere", "does not exist"),
        ("a/b/c", "does not exist"),
        ("not a name", "neither a folder nor a hub id"),
        ("some-org/some-model", "hub cannot be reached"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    model: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        read_headers(model)


def test_a_folder_without_config_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_headers(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        read_headers(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "ort", "dtype": "bfloat16"}, "--dtype bfloat16: nothing on a CPU runs"),
        ({"target": "ort", "dtype": "float16"}, "--dtype float16: ONNX Runtime's CPU"),
        ({"target": "openvino", "kv_buffer": "shared"}, "--kv-buffer shared: OpenVINO has no"),
        ({"target": "tensorrt", "int8_weights": "unsigned"}, "--int8-weights unsigned: Tens"),
    ],
)
def test_a_plan_refuses_options_as_the_run_would(
    tmp_path: Path, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        planned(write_llama(tmp_path / "model"), backend="onnx", **settings)


def test_a_plan_refuses_what_cannot_be_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RoPE that transformers updates by values, of no type that is known."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "dynamic-odd", ROPE_INIT_FUNCTIONS["dynamic"])
    rope = {"rope_type": "dynamic-odd", "rope_theta": 1e4, "factor": 2.0}
    folder = write_llama(tmp_path / "model", rope_parameters=rope)
    with pytest.raises(BackendError, match=r"cannot export 'model.rotary_emb'.*depends on values"):
        planned(folder, backend="onnx")
