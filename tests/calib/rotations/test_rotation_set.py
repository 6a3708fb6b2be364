"""The set of rotations: names, files, other tools' files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from calib.architectures import Space, wiring_for
from calib.errors import RotationError
from calib.rotations.files import load_rotations, save_rotations
from calib.rotations.foreign import export_dartquant, import_dartquant, import_spinquant
from calib.rotations.hadamard import hadamard_matrix
from calib.rotations.rotation_set import (
    Rotation,
    RotationSet,
    check_offered,
    fused_rotation,
    hadamard_rotation,
    hadamard_rotations,
    idle_rotations,
    online_rotations,
    orthogonality_defect,
)
from calib.rotations.starts import haar_start
from tests.sealing import edit_sealed, flipped

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 48, 6, 2, 12, 88


@pytest.fixture
def config() -> Any:
    return transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
    )


@pytest.fixture
def rotations() -> RotationSet:
    r2 = [
        torch.stack([haar_start(HEAD_DIM, 7 * layer + head) for head in range(KV_HEADS)])
        for layer in range(2)
    ]
    return RotationSet(
        [
            fused_rotation("r1", haar_start(HIDDEN, 0), origin="trained"),
            *(fused_rotation("r2", matrix, layer=layer) for layer, matrix in enumerate(r2)),
            *(hadamard_rotation("r3", HEAD_DIM, layer=layer) for layer in range(2)),
            *(hadamard_rotation("r4", FFN, layer=layer, seed=3) for layer in range(2)),
        ]
    )


def assert_same(left: RotationSet, right: RotationSet) -> None:
    assert list(left) == list(right)
    for a, b in zip(left.values(), right.values(), strict=True):
        fields = ("name", "kind", "space", "layer", "order", "seed", "online", "origin")
        assert [getattr(a, field) for field in fields] == [getattr(b, field) for field in fields]
        assert torch.equal(a.dense(), b.dense())


def test_lookup_by_kind_and_layer(rotations: RotationSet) -> None:
    assert rotations.kinds() == ("r1", "r2", "r3", "r4")
    assert rotations.r1() is rotations["R1"]
    assert rotations.r2(1) is rotations["R2.1"]
    assert rotations.r3(0) is rotations["R3.0"]
    assert rotations.r4(1) is rotations["R4.1"]
    assert rotations.r4(1, "shared") is None
    assert RotationSet().r1() is None
    assert RotationSet().kinds() == ()
    assert rotations["R4.0"].space is Space.FFN
    assert [rotation.online for rotation in rotations.values()] == [False] * 3 + [True] * 4


@pytest.mark.parametrize("name", ["R1", "R3.0", "R4.1"])
def test_apply_is_multiplication_by_the_dense_matrix(rotations: RotationSet, name: str) -> None:
    rotation = rotations[name]
    dense = rotation.dense()
    x = torch.randn(
        2, 3, dense.shape[-1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    torch.testing.assert_close(rotation.apply(x), x @ dense, rtol=1e-12, atol=1e-12)
    assert rotation.apply(x.float()).dtype == torch.float32
    torch.testing.assert_close(rotation.undo(x), x @ dense.mT, rtol=1e-12, atol=1e-12)
    assert rotation.undo(x.float()).dtype == torch.float32


def test_set_is_immutable_and_merges(rotations: RotationSet) -> None:
    replaced = rotations.merged([hadamard_rotation("r1", HIDDEN, seed=1)])
    assert replaced["R1"].matrix is None
    assert rotations["R1"].matrix is not None
    assert len(replaced) == len(rotations)
    with pytest.raises(TypeError):
        rotations["R1"] = replaced["R1"]  # type: ignore[index]
    with pytest.raises(RotationError, match="R1 is given twice"):
        RotationSet([rotations["R1"], replaced["R1"]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "R5", "kind": "r1", "space": Space.RESIDUAL, "order": 4}, "does not fit"),
        (
            {"name": "R2.1", "kind": "r2", "space": Space.VALUE, "layer": 0, "order": 4},
            "does not fit",
        ),
        (
            {"name": "R1", "kind": "r1", "space": Space.FFN, "order": 4},
            "acts on the residual space",
        ),
        ({"name": "R1", "kind": "r1", "space": Space.RESIDUAL}, "either a matrix or the order"),
        (
            {"name": "R1", "kind": "r1", "space": Space.RESIDUAL, "order": 4, "online": True},
            "folded into weights",
        ),
        (
            {"name": "R4.0", "kind": "r4", "space": Space.FFN, "layer": 0, "order": 4},
            "online Hadamard",
        ),
    ],
)
def test_inconsistent_rotations_cannot_be_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RotationError, match=message):
        Rotation(**fields)


def test_saving_and_loading(rotations: RotationSet, tmp_path: Path) -> None:
    save_rotations(rotations, tmp_path)
    assert_same(load_rotations(tmp_path), rotations)
    manifest = json.loads((tmp_path / "rotations.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["rotations"][0] == {
        "name": "R1",
        "kind": "r1",
        "space": "residual",
        "layer": None,
        "order": None,
        "seed": None,
        "online": False,
        "origin": "trained",
    }


def test_saving_a_set_without_matrices(tmp_path: Path) -> None:
    for rotations in (RotationSet(), RotationSet([hadamard_rotation("r1", 48, seed=2)])):
        save_rotations(rotations, tmp_path)
        assert_same(load_rotations(tmp_path), rotations)


@pytest.mark.parametrize("file", ["rotations.json", "rotations.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]"])
def test_missing_or_damaged_files(
    rotations: RotationSet, tmp_path: Path, file: str, content: bytes | None
) -> None:
    save_rotations(rotations, tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(RotationError, match="cannot be read"):
        load_rotations(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.update(format_version=3), "format version 3"),
        (lambda manifest: manifest["rotations"][0].update(space="moon"), "is damaged"),
        (lambda manifest: manifest["rotations"][0].pop("kind"), "is damaged"),
        (
            lambda manifest: manifest["rotations"][1].update(name="R2.5", layer=5),
            "matrix of R2.5 is missing",
        ),
    ],
)
def test_manifest_that_does_not_fit(
    rotations: RotationSet, tmp_path: Path, change: Any, message: str
) -> None:
    save_rotations(rotations, tmp_path)
    edit_sealed(tmp_path / "rotations.json", change)
    with pytest.raises(RotationError, match=message):
        load_rotations(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_is_found(rotations: RotationSet, tmp_path: Path, share: float) -> None:
    save_rotations(rotations, tmp_path)
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        for bit in (0, 6):
            path.write_bytes(flipped(data, int(share * (len(data) - 1)), bit))
            with pytest.raises(RotationError):
                load_rotations(tmp_path)
        path.write_bytes(data)
    load_rotations(tmp_path)


def test_rotations_without_a_seal_are_those_of_an_earlier_version(
    rotations: RotationSet, tmp_path: Path
) -> None:
    save_rotations(rotations, tmp_path)
    manifest = json.loads((tmp_path / "rotations.json").read_text())
    del manifest["sha256"], manifest["files"]
    (tmp_path / "rotations.json").write_text(json.dumps(manifest))
    assert_same(load_rotations(tmp_path), rotations)


def test_validation_accepts_what_fits(rotations: RotationSet, config: Any) -> None:
    rotations.validate(wiring_for(config))
    RotationSet().validate(wiring_for(config))


@pytest.mark.parametrize(
    ("rotation", "message"),
    [
        (hadamard_rotation("r1", 64), r"R1 has shape \[64, 64\] but the model needs \[48, 48\]"),
        (fused_rotation("r2", torch.eye(12), layer=0), r"needs \[2, 12, 12\]"),
        (fused_rotation("r2", torch.eye(12).expand(6, 12, 12), layer=0), r"needs \[2, 12, 12\]"),
        (hadamard_rotation("r2", 8, layer=0), r"needs \[2, 12, 12\]"),
        (hadamard_rotation("r4", 12, layer=1), r"R4.1 has shape \[12, 12\]"),
        (hadamard_rotation("r4", 88, layer=1, branch="shared"), "branch that Llama does not have"),
        (hadamard_rotation("r3", 12, layer=2), "names a layer that this model of 2 does not have"),
        (fused_rotation("r1", 1.001 * torch.eye(48)), r"max \|Q\^T Q - I\| is 2\.0e-03"),
        (fused_rotation("r1", torch.full((48, 48), float("nan"))), "not orthogonal"),
    ],
)
def test_validation_refuses_with_the_figure(rotation: Rotation, message: str, config: Any) -> None:
    with pytest.raises(RotationError, match=message):
        RotationSet([rotation]).validate(wiring_for(config))


def test_layer_norm_models_need_an_r1_that_fixes_ones() -> None:
    config = transformers.GPT2Config(n_embd=48, n_head=4, n_layer=1)
    wiring = wiring_for(config)
    hadamard_rotations(wiring, ["r1", "r2", "r3", "r4"]).validate(wiring)
    with pytest.raises(RotationError, match="moves the all-ones vector"):
        RotationSet([hadamard_rotation("r1", 48)]).validate(wiring)


def test_hadamard_rotations_cover_every_layer_and_branch() -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        decoder_sparse_step=2,
        intermediate_size=24,
    )
    names = list(hadamard_rotations(wiring_for(config), ["r1", "r2", "r4"], seed=1))
    assert names == ["R1", "R2.0", "R2.1", "R4.0", "R4.1", "R4.1.shared"]


def test_online_rotations_have_no_signs_whatever_the_seed() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    wiring, kinds = wiring_for(config), ["r2", "r3", "r4"]
    made = hadamard_rotations(wiring, kinds, seed=7)
    assert made["R2.0"].seed == 7
    online = online_rotations(wiring, kinds)
    assert [rotation.name for rotation in online] == ["R3.0", "R4.0", "R3.1", "R4.1"]
    assert [made[rotation.name].seed for rotation in online] == [None] * 4
    for rotation in online:
        assert vars(made[rotation.name]) == vars(rotation)


def test_r4_in_blocks_comes_back_from_a_file_that_older_readers_refuse(
    config: Any, tmp_path: Path
) -> None:
    """88 channels and blocks of at most 32: of 8, the largest power of two that divides."""
    blocked = RotationSet(online_rotations(wiring_for(config), ["r3", "r4"], block=32))
    assert [rotation.block for rotation in blocked.values()] == [None, 8, None, 8]
    assert blocked["R4.0"].origin == "Hadamard in blocks of 8"
    save_rotations(blocked, tmp_path / "blocked")
    found = load_rotations(tmp_path / "blocked")
    assert_same(found, blocked)
    assert torch.equal(found["R4.1"].dense(), hadamard_matrix(FFN, block=8))

    def version(folder: str) -> object:
        return json.loads((tmp_path / folder / "rotations.json").read_text())["format_version"]

    save_rotations(RotationSet(online_rotations(wiring_for(config), ["r4"])), tmp_path / "whole")
    assert (version("whole"), version("blocked")) == (1, 2)


def test_refused_kind_is_refused_early() -> None:
    config = transformers.Olmo2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(RotationError, match="R1 is refused for OLMo-2"):
        hadamard_rotations(wiring_for(config), ["r1"])


@pytest.mark.parametrize("head", [5, 6, 10])
@pytest.mark.parametrize("width", [21, 22, 44])
def test_idle_are_exactly_the_kinds_whose_matrices_are_the_identity(head: int, width: int) -> None:
    config = transformers.GPT2Config(n_embd=2 * head, n_head=2, n_layer=2, n_inner=width)
    wiring, idle = wiring_for(config), set[str]()
    for rotation in online_rotations(wiring, ["r3", "r4"]):
        assert rotation.order is not None
        if torch.equal(hadamard_matrix(rotation.order), torch.eye(rotation.order).double()):
            idle.add(rotation.kind)
    assert idle_rotations(wiring).keys() == idle
    assert idle == {kind for kind, order in (("r3", head), ("r4", width)) if order % 2}


def test_a_kind_that_idles_in_one_branch_alone_rotates_the_others() -> None:
    config = transformers.Qwen2MoeConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        moe_intermediate_size=21,
        shared_expert_intermediate_size=24,
    )
    assert idle_rotations(wiring_for(config)) == {}


def test_what_would_rotate_nothing_is_refused_with_what_to_take_instead() -> None:
    config = transformers.GPT2Config(n_embd=10, n_head=2, n_layer=1, n_inner=21)
    wiring = wiring_for(config)
    for kinds, first, rest in (
        (["r4"], "R4 .* width before the down projection of 21 is odd", "r1,r2"),
        (["r1", "r4"], "R4", "r1"),
        (["r3"], "R3 is refused for GPT-2: its head size of 5 is odd", "r1,r2"),
    ):
        with pytest.raises(RotationError, match=first) as caught:
            check_offered(kinds, wiring)
        assert caught.value.hint == f"give --rotate {rest}"
        check_offered(rest.split(","), wiring)


def test_dartquant_files_round_trip(rotations: RotationSet, tmp_path: Path) -> None:
    export_dartquant(rotations, tmp_path)
    assert set(torch.load(tmp_path / "r1.pt", weights_only=True)) == {"R1"}
    assert list(torch.load(tmp_path / "r2.pt", weights_only=True)) == [
        f"model.layers.{layer}.self_attn.R2" for layer in range(2)
    ]
    back = import_dartquant(tmp_path / "r1.pt", tmp_path / "r2.pt", kv_heads=KV_HEADS)
    assert list(back) == ["R1", "R2.0", "R2.1"]
    for name, rotation in back.items():
        torch.testing.assert_close(rotation.dense(), rotations[name].dense(), rtol=0, atol=1e-14)


def test_imported_float32_matrices_become_orthogonal_in_float64(tmp_path: Path) -> None:
    source = haar_start(96, 0)
    torch.save({"R1": source.float()}, tmp_path / "r1.pt")
    imported = import_dartquant(tmp_path / "r1.pt", None, kv_heads=1)["R1"]
    assert 1e-9 < orthogonality_defect(fused_rotation("r1", source.float())) < 1e-6
    assert orthogonality_defect(imported) < 1e-13
    torch.testing.assert_close(imported.dense(), source, rtol=0, atol=1e-7)


def test_query_heads_of_a_group_must_agree(tmp_path: Path) -> None:
    per_kv = torch.stack([haar_start(HEAD_DIM, head) for head in range(KV_HEADS)])
    key = "model.layers.0.self_attn.R2"
    torch.save({key: per_kv.repeat_interleave(HEADS // KV_HEADS, dim=0)}, tmp_path / "r2.pt")
    imported = import_dartquant(None, tmp_path / "r2.pt", kv_heads=KV_HEADS)["R2.0"]
    torch.testing.assert_close(imported.dense(), per_kv, rtol=0, atol=1e-14)
    torch.save({key: per_kv.repeat(HEADS // KV_HEADS, 1, 1)}, tmp_path / "r2.pt")
    with pytest.raises(RotationError, match="another rotation for every query head"):
        import_dartquant(None, tmp_path / "r2.pt", kv_heads=KV_HEADS)


def test_spinquant_file(tmp_path: Path) -> None:
    r2 = haar_start(HEAD_DIM, 4)
    torch.save({"R1": haar_start(HIDDEN, 0), "model.layers.3.self_attn.R2": r2}, tmp_path / "R.bin")
    imported = import_spinquant(tmp_path / "R.bin", kv_heads=KV_HEADS)
    assert list(imported) == ["R1", "R2.3"]
    torch.testing.assert_close(
        imported["R2.3"].dense(), r2.expand(KV_HEADS, -1, -1), rtol=0, atol=1e-14
    )
    assert imported["R1"].origin == "SpinQuant"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.eye(3), "does not hold a dictionary of float tensors"),
        ({"R1": [1.0]}, "does not hold a dictionary of float tensors"),
        ({"R7": torch.eye(3)}, "unknown entry 'R7'"),
        ({"R1": torch.ones(3, 4)}, "not square"),
        ({"R1": torch.ones(3)}, "not square"),
        ({"R1": haar_start(32, 0).bfloat16()}, "not orthogonal"),
        ({"model.layers.0.self_attn.R2": torch.ones(3, 4, 4)}, "does not fit 2 KV heads"),
    ],
)
def test_foreign_files_that_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "R.bin")
    with pytest.raises(RotationError, match=message):
        import_spinquant(tmp_path / "R.bin", kv_heads=KV_HEADS)


def test_hostile_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "R.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(RotationError, match="cannot be read as a file of rotation matrices"):
        import_spinquant(tmp_path / "R.bin", kv_heads=KV_HEADS)
    assert not Path("pwned").exists()
    with pytest.raises(RotationError, match="cannot be read"):
        import_spinquant(tmp_path / "missing.bin", kv_heads=KV_HEADS)


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_a_file_that_was_cut_off_is_one_line(kept: int, tmp_path: Path) -> None:
    torch.save({"R1": torch.eye(3)}, tmp_path / "r1.pt")
    (tmp_path / "r1.pt").write_bytes((tmp_path / "r1.pt").read_bytes()[:kept])
    with pytest.raises(RotationError, match=r"r1\.pt cannot be read as a file of") as caught:
        import_dartquant(tmp_path / "r1.pt", None, kv_heads=KV_HEADS)
    assert "\n" not in caught.value.message
    assert kept or caught.value.message.endswith("it is empty or cut off")


def test_hadamard_rotation_is_the_seeded_matrix() -> None:
    rotation = hadamard_rotation("r4", 44, layer=0, seed=9)
    assert torch.equal(rotation.dense(), hadamard_matrix(44, seed=9))
    assert rotation.origin == "Hadamard, seed 9"
    assert orthogonality_defect(rotation) == 0.0
