"""Everything that makes numbers: rotations, statistics, calibration, scales, and the artifact that holds them."""
