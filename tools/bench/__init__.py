"""Benchmarks, each as ratios inside one run.

command.py          distillcache bench
figures.py          figures and goals of a benchmark
machine.py          the machine, and how busy it is
compiled.py         programs compiled once
build.py            build against the bare teacher
busy.py             a process that keeps a core busy
feed.py             feed against memory speed and other formats
peer_formats.py     formats of other systems
synthetic_cache.py  caches of random numbers
codec.py            accuracy and cost of codecs
compress.py         lossless compression
steps/              training steps: from a cache and online, the KL over the vocabulary, mixers
students/           quality of students that are trained in different ways
load.py             memory of loading a sharded checkpoint
load_share.py       one process of that
accelerator/        a new accelerator, in ten minutes
"""
