"""Captures on disk, their samples as data sets, and splits of the samples."""

from __future__ import annotations

import pickle  # noqa: TID251 -- what a DataLoader does with a data set, not a way to read files
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from capture_support import HEAD_DIM, HIDDEN, KV, LAYERS, build_llama, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from calib.capture.datasets import R1Dataset, R2Dataset
from calib.capture.fingerprint import model_fingerprint
from calib.capture.result import Samples
from calib.capture.sites import CaptureSite
from calib.capture.storage import Capture
from calib.errors import CheckpointError, DataError, OutputError, RotationError
from tests.sealing import edit_sealed, flipped


@pytest.fixture
def captured(llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor]) -> Capture:
    return run(llama, sites, rows)


def test_round_trip(captured: Capture, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "capture"
    captured.save(folder)
    loaded = Capture.load(folder, model=model_fingerprint(llama))
    assert loaded.provenance == captured.provenance
    assert torch.equal(loaded.r1.covariance, captured.r1.covariance)
    assert torch.equal(loaded.r1.samples.values, captured.r1.samples.values)
    assert torch.equal(loaded.r2_samples(), captured.r2_samples())
    assert list(loaded.sites) == list(captured.sites)
    assert list(loaded.r2) == [0, 1]
    assert torch.equal(loaded.r2[1].samples.weights, captured.r2[1].samples.weights)
    assert loaded.r2[1].channels.count == captured.r2[1].channels.count
    loaded.save(tmp_path / "again")
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    # nothing temporary is left
    assert [path.name for path in folder.parent.iterdir()] == ["capture"]


def test_a_part_that_was_not_captured_is_named(
    llama: LlamaForCausalLM, sites: list[CaptureSite], rows: list[Tensor], tmp_path: Path
) -> None:
    run(llama, [site for site in sites if site.rotation == "r2"], rows).save(tmp_path / "r2")
    run(llama, [site for site in sites if site.rotation == "r1"], rows).save(tmp_path / "r1")
    with pytest.raises(RotationError, match="no R1 activations"):
        _ = Capture.load(tmp_path / "r2").r1
    with pytest.raises(RotationError, match="no R2 activations"):
        Capture.load(tmp_path / "r1").r2_samples()
    assert Capture.load(tmp_path / "r1").r2 == {}


def truncate(folder: Path) -> None:
    path = folder / "r1.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def damage(folder: Path) -> None:
    path = folder / "r2.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_sealed(folder / "manifest.json", change)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "holds no capture"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "is damaged"),
        (
            edit(lambda manifest: manifest.update(format_version=4)),
            "capture format 4, this rotq reads 3",
        ),
        (edit(lambda manifest: manifest.pop("provenance")), "is damaged: KeyError"),
        (edit(lambda manifest: manifest.update(config={"future": 1})), "is damaged: TypeError"),
        (edit(lambda manifest: manifest.update(sites=["other"])), "is damaged: KeyError"),
        (
            lambda folder: (folder / "statistics.safetensors").unlink(),
            "statistics.safetensors is missing",
        ),
        (truncate, "r1.safetensors is damaged"),
        (damage, "r2.safetensors is damaged"),
    ],
)
def test_unusable_folders_say_what_is_wrong(
    captured: Capture, tmp_path: Path, harm: Callable[[Path], object], said: str
) -> None:
    captured.save(tmp_path / "capture")
    harm(tmp_path / "capture")
    with pytest.raises(CheckpointError, match=said) as caught:
        Capture.load(tmp_path / "capture")
    assert caught.value.hint is not None


def test_another_model_is_refused(
    captured: Capture, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    captured.save(tmp_path / "capture")
    with torch.no_grad():
        llama.model.layers[0].input_layernorm.weight.mul_(2)  # as folding does
    with pytest.raises(CheckpointError, match="of another model"):
        Capture.load(tmp_path / "capture", model=model_fingerprint(llama))


def test_fingerprints_tell_models_apart() -> None:
    same = model_fingerprint(build_llama(0))
    assert model_fingerprint(build_llama(0)) == same
    assert model_fingerprint(build_llama(1)) != same
    assert model_fingerprint(build_llama(0).to(torch.bfloat16)) != same


def test_an_existing_folder_is_never_touched(captured: Capture, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        captured.save(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        captured.save(tmp_path / "file" / "capture")


def test_data_sets_read_single_samples(captured: Capture, tmp_path: Path) -> None:
    captured.save(tmp_path / "capture")
    r1 = R1Dataset(tmp_path / "capture")
    assert len(r1) == 64
    value, weight = r1[63]
    assert torch.equal(value, captured.r1.samples.values[63])
    assert weight == captured.r1.samples.weights[63]
    assert len(list(r1)) == 64  # stops by IndexError, as a sequence does
    values, weights = next(iter(DataLoader(r1, batch_size=5)))
    assert values.shape == (5, HIDDEN)
    assert weights.shape == (5,)

    r2 = R2Dataset(tmp_path / "capture", 1, seed=3)
    assert len(r2) == 64  # 32 tokens, two query heads per key/value head
    values = torch.stack([value for value, _ in r2])
    assert values.shape == (64, KV, HEAD_DIM)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(values.transpose(0, 1), captured.r2_samples()[1][:, order])
    assert torch.equal(
        torch.stack([weight for _, weight in r2]), captured.r2[1].samples.weights[order]
    )
    other = torch.stack([value for value, _ in R2Dataset(tmp_path / "capture", 1, seed=4)])
    assert not torch.equal(values, other)
    again = pickle.loads(pickle.dumps(r2))  # noqa: S301 -- its own output
    assert torch.equal(again[0][0], r2[0][0])

    with pytest.raises(DataError, match=f"no R2 layer {LAYERS}"):
        R2Dataset(tmp_path / "capture", LAYERS)
    with pytest.raises(CheckpointError, match="cannot read the samples"):
        R1Dataset(tmp_path)


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(0, 20), st.integers(1, 3), st.floats(0.05, 0.95))
def test_a_split_keeps_every_sample_and_every_total(
    tokens: int, massive: int, group: int, fraction: float
) -> None:
    massive = min(massive, tokens // 2)
    values = torch.arange(2 * tokens * group, dtype=torch.float32).view(2, tokens * group, 1)
    weights = torch.ones(2, tokens * group)
    weights[:, massive * group :] = 7.0
    samples = Samples(values, weights, massive * group, group)
    if massive < 2 and tokens - massive < 2:  # one token of a kind cannot be in both parts
        with pytest.raises(DataError, match="cannot hold out"):
            samples.split(fraction)
        return
    train, held = samples.split(fraction)
    both = torch.cat([train.values, held.values], dim=1)
    assert torch.equal(both.sort(dim=1).values, values)
    assert held.values.shape[1] % group == train.values.shape[1] % group == 0
    assert 0 < held.values.shape[1] < tokens * group
    for part in (train, held):
        assert torch.equal(
            part.values[0, :, 0] // group,
            part.values[0, ::group, 0].repeat_interleave(group) // group,
        )
        # the weights of a part stand for all tokens, unless a kind with a single token is in the
        # other part
        if massive != 1 and tokens - massive != 1:
            torch.testing.assert_close(part.weights.sum(-1), weights.sum(-1), rtol=1e-6, atol=0)


def test_held_out_parts_of_a_capture(captured: Capture) -> None:
    train, held = captured.held_out("r1", 0.25)
    assert (len(train.values), len(held.values), train.massive, held.massive) == (48, 16, 12, 4)
    train, held = captured.held_out("r2", 0.25)
    assert train.values.shape == (LAYERS, KV, 48, HEAD_DIM)
    assert held.weights.shape == (LAYERS, 16)
    for fraction in (0.0, 1.0):
        with pytest.raises(DataError, match="cannot hold out"):
            captured.held_out("r1", fraction)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_bit_in_any_file_is_found(
    captured: Capture, tmp_path: Path, share: float
) -> None:
    captured.save(tmp_path / "capture")
    for path in sorted((tmp_path / "capture").iterdir()):
        data = path.read_bytes()
        for bit in (0, 6):
            path.write_bytes(flipped(data, int(share * (len(data) - 1)), bit))
            with pytest.raises(CheckpointError):
                Capture.load(tmp_path / "capture")
        path.write_bytes(data)
    Capture.load(tmp_path / "capture")
