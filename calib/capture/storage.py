"""A capture, in memory and on disk.

A folder holds ``manifest.json`` (what it is and where it comes from) and safetensors files:
``statistics`` with every mean and covariance, ``r1`` and ``r2`` with the samples. It is written
next to its destination and renamed, so that a folder of that name is always complete. Loading maps
the files into memory and reads what is used.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from calib.capture.result import Provenance, Samples, SiteStatistics
from calib.capture.sites import CaptureConfig, Rotation
from calib.capture.statistics import ChannelStatistics
from calib.errors import CheckpointError, OutputError, RotationError
from calib.files.reading import MALFORMED, reason_of
from calib.files.sealed import DamagedError, read_sealed, write_sealed

FORMAT_VERSION = 3
"""2: checksums; 3: the prefix."""
MANIFEST = "manifest.json"
STATISTICS, R1_SAMPLES, R2_SAMPLES = "statistics.safetensors", "r1.safetensors", "r2.safetensors"
_CHANNELS = ("mean", "std", "minimum", "maximum")
_WITHOUT = "Leave it out of --rotate."
_AGAIN = "Capture again, or give another folder."


class Capture:
    """The result of :func:`calib.capture.session.capture`.

    Attributes:
        sites: the channel statistics of each R1 site, by module name; vectors [hidden].
        r2: the statistics of each layer with an R2 site; empty if R2 was not captured.
        provenance: model, data and settings.
    """

    def __init__(
        self,
        *,
        r1: SiteStatistics | None,
        sites: Mapping[str, ChannelStatistics],
        r2: Mapping[int, SiteStatistics],
        r2_stack: Samples | None,
        provenance: Provenance,
    ) -> None:
        self._r1 = r1
        self._r2_stack = r2_stack
        self.sites = dict(sites)
        self.r2 = dict(r2)
        self.provenance = provenance

    @property
    def r1(self) -> SiteStatistics:
        """The residual space, pooled over all R1 sites.

        Raises:
            RotationError: no R1 site was captured.
        """
        if self._r1 is None:
            raise RotationError(
                "the capture holds no R1 activations: its model takes no R1", hint=_WITHOUT
            )
        return self._r1

    def stacked_r2(self) -> Samples:
        """The samples of all R2 layers, in the order of ``r2``: values [layers, kv, S, head_dim],
        weights [layers, S].

        Raises:
            RotationError: no R2 site was captured.
        """
        if self._r2_stack is None:
            raise RotationError(
                "the capture holds no R2 activations: its model takes no R2", hint=_WITHOUT
            )
        return self._r2_stack

    def r2_samples(self) -> Tensor:
        """The values of :meth:`stacked_r2`: [layers, kv, S, head_dim]."""
        return self.stacked_r2().values

    def held_out(self, rotation: Rotation, fraction: float = 0.2) -> tuple[Samples, Samples]:
        """The samples of R1, or the stacked ones of R2, as (train, held out); see
        :meth:`Samples.split`.
        """
        samples = self.r1.samples if rotation == "r1" else self.stacked_r2()
        return samples.split(fraction)

    def save(self, folder: Path) -> None:
        """Write the capture to ``folder``, which must not exist.

        The same capture gives the same bytes.

        Raises:
            OutputError: the folder exists, or cannot be written.
        """
        if folder.exists():
            raise OutputError(
                f"'{folder}' exists already", hint="Give another folder, or remove this one."
            )
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            self.write(partial)
            partial.rename(folder)
        except OSError as error:
            raise OutputError(
                f"cannot write the capture to '{folder}': {error.strerror}",
                hint="Check space and permissions.",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path, *, model: str | None = None) -> Capture:
        """Map a saved capture into memory.

        Args:
            folder: what :meth:`save` has written.
            model: the :func:`~calib.capture.fingerprint.model_fingerprint` that it must be of, if
                that matters.

        Raises:
            CheckpointError: the folder is missing, incomplete, damaged, of another model, or from a
                newer rotq.
        """
        manifest = _read_manifest(folder)
        try:
            own = manifest["provenance"]
            config, prefix = CaptureConfig(**manifest["config"]), tuple(own["prefix"])
            provenance = Provenance(**{**own, "config": config, "prefix": prefix})
            if model is not None and provenance.model != model:
                raise CheckpointError(
                    f"the capture in '{folder}' is of another model ({provenance.model[:12]}, not"
                    f" {model[:12]})",
                    hint=(
                        "Capture again with this model; folding or fine-tuning makes it another"
                        " one."
                    ),
                )
            return cls(
                **_assemble(manifest, _read_tensors(folder, manifest)), provenance=provenance
            )
        except MALFORMED as error:
            raise CheckpointError(
                f"'{folder / MANIFEST}' is damaged: {reason_of(error)}", hint=_AGAIN
            ) from error

    def write(self, folder: Path) -> None:
        """Write the files of the capture into ``folder``, which exists and is empty."""
        statistics: dict[str, Tensor] = {}
        counts: dict[str, int] = {}

        def put(key: str, channels: ChannelStatistics, covariance: Tensor | None = None) -> None:
            statistics.update({f"{key}/{name}": getattr(channels, name) for name in _CHANNELS})
            counts[key] = channels.count
            if covariance is not None:
                statistics[f"{key}/covariance"] = covariance

        for name, channels in self.sites.items():
            put(f"site/{name}", channels)
        for layer, site in self.r2.items():
            put(f"r2/{layer}", site.channels, site.covariance)
        samples: dict[str, Samples] = {}
        if self._r1 is not None:
            put("r1", self._r1.channels, self._r1.covariance)
            samples[R1_SAMPLES] = self._r1.samples
        if self._r2_stack is not None:
            samples[R2_SAMPLES] = self._r2_stack
        save_file(statistics, folder / STATISTICS)
        for file, kept in samples.items():
            save_file({"values": kept.values, "weights": kept.weights}, folder / file)
        provenance = asdict(self.provenance)
        manifest = {
            "format_version": FORMAT_VERSION,
            "config": provenance.pop("config"),
            "provenance": provenance,
            "sites": list(self.sites),
            "layers": list(self.r2),
            "counts": counts,
            "samples": {
                file: {"massive": kept.massive, "group": kept.group}
                for file, kept in samples.items()
            },
        }
        write_sealed(folder / MANIFEST, manifest, (STATISTICS, *samples))


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"'{folder}' holds no capture: {MANIFEST} is missing", hint=_AGAIN)
    try:
        return read_sealed(path, lambda manifest: _check_version(folder, manifest))
    except (DamagedError, OSError) as error:
        raise CheckpointError(
            f"the capture in '{folder}' is damaged: {reason_of(error)}", hint=_AGAIN
        ) from error


def _check_version(folder: Path, manifest: dict[str, Any]) -> None:
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"'{folder}' has capture format {version}, this rotq reads {FORMAT_VERSION}",
            hint="Upgrade rotq (pip install --upgrade rotq), or capture again.",
        )


def _read_tensors(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    for file in manifest["files"]:
        path = folder / file
        try:
            tensors[file] = load_file(path)
        except (SafetensorError, OSError, *MALFORMED) as error:
            raise CheckpointError(
                f"'{path}' is damaged: {reason_of(error)}", hint=_AGAIN
            ) from error
    return tensors


def _assemble(manifest: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    statistics, counts = tensors[STATISTICS], manifest["counts"]

    def channels(key: str) -> ChannelStatistics:
        return ChannelStatistics(
            counts[key], **{name: statistics[f"{key}/{name}"] for name in _CHANNELS}
        )

    def samples(file: str) -> Samples | None:
        if file not in tensors:
            return None
        kept = manifest["samples"][file]
        found = Samples(
            tensors[file]["values"], tensors[file]["weights"], kept["massive"], kept["group"]
        )
        _check_samples(found, dimensions=2 if file == R1_SAMPLES else 4)
        return found

    r1, stack = samples(R1_SAMPLES), samples(R2_SAMPLES)
    return {
        "r1": (
            None if r1 is None else SiteStatistics(channels("r1"), statistics["r1/covariance"], r1)
        ),
        "sites": {name: channels(f"site/{name}") for name in manifest["sites"]},
        "r2": {
            layer: SiteStatistics(
                channels(f"r2/{layer}"), statistics[f"r2/{layer}/covariance"], stack.layer(index)
            )
            for index, layer in enumerate(manifest["layers"])
            if stack is not None
        },
        "r2_stack": stack,
    }


def _check_samples(samples: Samples, *, dimensions: int) -> None:
    """What every user of samples takes for granted.

    Raises:
        ValueError: shapes or counts do not fit each other.
    """
    shape, counts = samples.values.shape, (samples.massive, samples.group)
    if len(shape) != dimensions or samples.weights.shape != (*shape[:-3], shape[-2]):
        raise ValueError(f"samples {list(shape)} with weights {list(samples.weights.shape)}")
    whole = all(isinstance(count, int) for count in counts)
    if not whole or not 0 <= samples.massive <= shape[-2] or samples.group < 1:
        raise ValueError(f"{samples.massive!r} massive samples in groups of {samples.group!r}")
