"""Tokenizers and chat templates.

tokenizer.py         the tokenizer of a checkpoint
tokenizer_settings.py  keys of tokenizer_config.json that change a text's tokens
long_text.py         tokenises long texts window by window in bounded memory
cache_tokenizer.py   the tokenizer stored in a cache
chat_files.py        chat templates and special tokens that a folder names
chat_template.py     renders chats, and marks the assistant's text
template_worker.py   client of the template process
template_process.py  subprocess that renders templates under limits of time and memory
"""
