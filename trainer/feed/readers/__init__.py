"""Stored arrays, read by rows into a batch.

requests.py  chunks of an array that a batch needs, and how they are fetched together
local.py     local disks
bucket.py    buckets
unpack.py    decompression by TensorStore's codecs
threads.py   thread pool for bucket reads
"""
