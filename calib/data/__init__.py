"""Calibration text: reading documents, cutting them into token rows, batching the rows, and
splitting a corpus.
"""
