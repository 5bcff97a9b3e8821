"""Formats on disk: where each file of a cache lies and what it contains.

layout.py      paths inside a cache, and shard sizes
canonical.py   canonical JSON with an embedded digest
digest.py      the content digest of stored bytes
manifest.py    plan, shard receipt, statistics, manifest
tap_plan.py    tap settings to tap plans: slots, codec options, arrays
tap_codec.py   the codec that a tap plan names
index.py       index.bin: fixed-width records of shard digests
rows.py        rows and the row folder
times.py       time that shards took
checkpoint.py  training checkpoints: arrays in boxes, one writer for each
run.py         a run's folder: names of what others read, digests of evaluations
run_identity.py a run's run.json: its settings, digests of the files it began with
"""
