"""Stage 1: text to a cache.

inputs.py    what data.path names, anywhere    documents.py what the files hold (text, chat, parquet, array_records)
file_marks.py what first bytes say
tokenise.py  documents to tokens               packing.py   tokens to rows
prepare.py   a rows folder, by one process     shared_prepare.py  by many; beam.py: by a pipeline
plan.py      what will be built
write.py     objects and receipts              build.py     the loop: teacher, write, commit
finish.py    index, statistics, manifest       pieces.py    a segment's work, shared by processes
fixed.py     files that rows do not change     extend.py    a finished cache grows by a segment
replica.py   the teacher's devices             lockstep.py  a build by processes that share one teacher
copy.py      a cache to another one            transcode.py a tap from codec to codec
"""
