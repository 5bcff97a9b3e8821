"""GGUF files.

file.py       opens files; tensors under Hugging Face names
reader.py     parses headers with counts checked against the file's size
config.py     metadata to ModelConfig
tokenizer.py  the tokenizer inside the file
remote.py     files in buckets
"""
