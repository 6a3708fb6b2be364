"""Numbers: rounding to a format, scales from amax, grids of stored values, quantized inputs."""
