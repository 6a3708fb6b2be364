"""ONNX Q/DQ graphs: standard operators only, one file that several runtimes load."""
