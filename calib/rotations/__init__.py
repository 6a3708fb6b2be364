"""Rotations: Hadamard matrices, starting points, objectives and optimisers on the orthogonal
group.
"""
