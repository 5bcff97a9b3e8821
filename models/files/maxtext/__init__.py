"""MaxText checkpoints.

checkpoint.py  reads parameter checkpoints
names.py       parameter names, stacking, numeric conventions
orbax.py       arrays of an Orbax checkpoint
export.py      writes parameter checkpoints
"""
