"""The three states of a prepared model."""

from __future__ import annotations

from enum import Enum


class FakeQuantState(Enum):
    """What fake-quantizers do with a tensor that passes through them.

    | state       | observes | rounds |
    |-------------|----------|--------|
    | CALIBRATION | yes      | no     |
    | VALIDATION  | no       | yes    |
    | QAT         | yes      | yes    |

    Source: ``FakeQuantState`` of Horizon's plugin ("Calibration v2").
    """

    QAT = "qat"
    CALIBRATION = "calibration"
    VALIDATION = "validation"

    @property
    def observes(self) -> bool:
        """Whether observers take note of the tensor."""
        return self is not FakeQuantState.VALIDATION

    @property
    def rounds(self) -> bool:
        """Whether the tensor is rounded to its grid."""
        return self is not FakeQuantState.CALIBRATION
