"""GGUF files.

file.py       opens files; tensors under Hugging Face names
reader.py     parses headers with counts checked against the file's size
values.py     keys of metadata: understood, harmless or refused
config.py     metadata to ModelConfig
translated.py the same by way of a config.json
rotation.py   rotary embedding
joined.py     tensors of translated architectures
recurrent.py  blocks with the gated delta rule
tokenizer.py  the tokenizer inside the file
remote.py     files in buckets
"""
