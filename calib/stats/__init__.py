"""Statistics of every decoder linear, and what a quantization scheme does to it: what ``rotq
stats`` reports.
"""
