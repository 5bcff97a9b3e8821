"""From input files to packed rows.

files/           input files, one module for each format
document.py      Document: text or tokens, and where it was found
documents.py     documents from input files
chat.py          chats to text, with the assistant's spans
skipped.py       records left out by data.on_error: skip
tokenise.py      documents to tokens and their loss mask, in parallel batches
packing.py       token streams to rows, and which of them are held out
rows_files.py    writes a row folder
rows_mark.py     the mark of the process that prepares a row folder
shared.py        row preparation by many processes
token_stream.py  token streams as objects in a store, for many processes
beam.py          row preparation as an Apache Beam pipeline
digest.py        digest of a corpus
"""
