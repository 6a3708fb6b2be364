"""Rotations: Hadamard matrices, starting points, objectives and optimisers on the orthogonal
group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from calib._names.faces import lazy_names

if TYPE_CHECKING:
    from calib.rotations.files import load_rotations, save_rotations
    from calib.rotations.foreign import (
        export_dartquant,
        import_dartquant,
        import_rotations,
        import_spinquant,
    )
    from calib.rotations.from_capture import TrainedRotations, train_rotations
    from calib.rotations.rotation_set import (
        Rotation,
        RotationSet,
        fused_rotation,
        hadamard_rotation,
        hadamard_rotations,
        online_rotations,
    )
    from calib.rotations.train import TrainResult, train_rotation
    from calib.rotations.train_config import TrainConfig

__all__ = [
    "Rotation",
    "RotationSet",
    "TrainConfig",
    "TrainResult",
    "TrainedRotations",
    "export_dartquant",
    "fused_rotation",
    "hadamard_rotation",
    "hadamard_rotations",
    "import_dartquant",
    "import_rotations",
    "import_spinquant",
    "load_rotations",
    "online_rotations",
    "save_rotations",
    "train_rotation",
    "train_rotations",
]

if not TYPE_CHECKING:
    __getattr__ = lazy_names(
        __name__,
        {
            "files": (
                "load_rotations",
                "save_rotations",
            ),
            "foreign": (
                "export_dartquant",
                "import_dartquant",
                "import_rotations",
                "import_spinquant",
            ),
            "from_capture": (
                "TrainedRotations",
                "train_rotations",
            ),
            "rotation_set": (
                "Rotation",
                "RotationSet",
                "fused_rotation",
                "hadamard_rotation",
                "hadamard_rotations",
                "online_rotations",
            ),
            "train": (
                "TrainConfig",
                "TrainResult",
                "train_rotation",
            ),
        },
    )
