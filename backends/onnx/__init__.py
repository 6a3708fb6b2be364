"""ONNX Q/DQ graphs: standard operators only, one file that several runtimes load.

Public is the backend; everything else may change.
"""

__all__ = ["backend"]
