"""Faults that are put in on purpose: does the parity check find each of them?

``python -m tests.sabotage`` runs all of them and prints which check caught which; a fixed few are
in the default suite (``tests/test_sabotage.py``).
"""
