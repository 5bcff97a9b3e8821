"""GGUF files.

file.py       opens files; tensors under Hugging Face names
reader.py     parses headers with counts checked against the file's size
config.py     metadata to ModelConfig
recurrent.py  blocks with the gated delta rule
tokenizer.py  the tokenizer inside the file
remote.py     files in buckets
"""
