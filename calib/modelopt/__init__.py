"""Calibration through NVIDIA ModelOpt: the only package of rotq that imports ``modelopt``."""
