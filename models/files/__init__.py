"""Checkpoints: reading, identifying and writing them.

foreign.py      recognises folders and files that are not supported checkpoints, with advice
hf.py           files of a Hugging Face directory
safetensors.py  safetensors parts and buckets, beyond what the library reads
tensors.py      names and shapes of tensors in stacked parameters
packed.py       packed weights: MXFP4, FP8, fused projections
fill.py         fills parameters, one device's part at a time
ranges.py       range reads of objects with read-ahead
gguf/           GGUF files
maxtext/        MaxText checkpoints (Orbax)
runs.py         a training run's student as a checkpoint
identity.py     digest of a checkpoint's weights
export.py       writes Hugging Face directories
adapter.py      writes adapters for peft
"""
