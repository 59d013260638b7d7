"""Fuzzing of everything that reads a file: `python -m tests.fuzz --seconds 600` (`make fuzz`), in short
`tests/test_fuzz.py`.

A target reads one kind of file. Its module `targets_*.py` in this folder registers it; nothing else is needed.
"""
