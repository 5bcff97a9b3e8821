"""GGUF files.

file.py          opens files; tensors under Hugging Face names
reader.py        parses headers with counts checked against the file's size
values.py        keys of metadata: understood, harmless or refused
rotation.py      rotary embedding
config.py        metadata to ModelConfig, of architectures near to Llama
recurrent.py     blocks with the gated delta rule
translated.py    metadata to ModelConfig by way of a config.json
architectures.py the architectures that are read so
dense.py         of them those with dense blocks, or with windows
mixtures.py      those with experts
hybrids.py       those with recurrent blocks
joined.py        their tensors
tokenizer.py     the tokenizer inside the file
remote.py        files in buckets
"""
