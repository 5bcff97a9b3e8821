"""Benchmark of a new accelerator, in one command of less than ten minutes.

sections.py  bench accelerator: its parts, one after the other
kernels.py   attention kernels, and ways to run experts
memory.py    a random teacher: size, memory and speed of its recorder; memory of a student's step
parity.py    logits against transformers' on the CPU
"""
