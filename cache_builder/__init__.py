"""Stage 1: text to a cache.

prepare.py  text to a row folder, by one process or several
build.py    chooses build, extend, repair or abandon
text/       input files, tokenising, packing
record/     the recording loop: plan, work units, shards
grow/       extend, copy, transcode, abandon
repair/     find damage and restore it
"""
