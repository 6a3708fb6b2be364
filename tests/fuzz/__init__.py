"""Damaged input for everything that rotq reads: ``python -m tests.fuzz``, or ``make fuzz``.

Every kind of input begins as a folder that rotq accepts. Bytes and structures of it are changed by
a seeded generator, manifests are sealed anew so that what stands behind a checksum is met as well,
and the readers of rotq are called. They may accept what they get or refuse it by an error of rotq
of one line; a traceback, a hang, code that runs and memory without bound are failures.
"""
