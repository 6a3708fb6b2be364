"""Experts that transformers keeps as 3-D parameters ``[experts, out, in]``: every expert a linear
of its own.
"""
