"""Stage 1: text to a cache.

text.py      documents from files              prepare.py   documents to packed rows
plan.py      what will be built                claims.py    who builds which piece
write.py     objects and receipts              build.py     the loop: teacher, write, commit
finish.py    index, statistics, manifest       pieces.py    a segment's work, shared by processes
fixed.py     files that rows do not change     extend.py    a finished cache grows by a segment
copy.py      a cache to another one            transcode.py a tap from codec to codec
"""
