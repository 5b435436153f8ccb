"""Torture: kills, flipped bits, mutated files, full disks, closed terminals and two processes, for hours.

`make torture` runs it (`python -m tests.torture --help`); `test_torture.py` runs a slice of it in the gate.
"""
