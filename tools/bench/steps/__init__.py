"""Benchmarks of training steps.

step.py     step from a cache against a teacher in the loop
head_kl.py  KL over the whole vocabulary, memory and time
mixers.py   gated delta rule against attention
"""
