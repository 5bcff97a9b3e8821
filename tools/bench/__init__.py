"""Benchmarks, each as ratios inside one run.

command.py          distillcache bench
figures.py          figures and goals of a benchmark
build.py            build against the bare teacher
feed.py             feed against memory speed and other formats
peer_formats.py     formats of other systems
synthetic_cache.py  caches of random numbers
codec.py            accuracy and cost of codecs
compress.py         lossless compression
step.py             step from a cache against a teacher in the loop
kl.py               students from three losses on tokens
head_kl.py          KL over the whole vocabulary, memory and time
student.py          students from caches of different codecs
routing.py          balancing with and without a loss
load.py             memory of loading a sharded checkpoint
load_share.py       one process of that
"""
