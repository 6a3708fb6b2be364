"""Faults of the machine, put in on purpose: processes killed at every file operation, disks that
are full, bytes that are damaged. ``python -m tests.faults`` runs all of it and prints a table.
"""
