"""Stage 2: a cache to a trained student.

feed.py         cached rows and taps, by row number, and the Grain pipeline over them
arrays.py       one stored array from a local disk      remote.py       and from a bucket
requests.py     which chunks are asked for together     local_cache.py  what is kept of a bucket on a local disk
slots.py        which stored slots a batch needs, and where they lie
losses.py       pure losses, the same in the scan and in the tests
step.py         one optimizer step: the blockwise gradient inside the scan
optimizer.py    AdamW whose state and clipping are per block
evaluate.py     held-out perplexity and per-block cosine distance; yardstick.py has the teacher's
student.py      where a run's student comes from    importance.py  what each part of the teacher was worth
placement.py    between a process's memory and the devices of a mesh; block_groups.py feeds them
checkpoints.py  which checkpoints a run has
metrics.py      what is measured, by name           metrics_log.py       JSON lines and TensorBoard
run_folder.py   whose a run's folder is, and what it says of itself
train.py        the loop
"""
