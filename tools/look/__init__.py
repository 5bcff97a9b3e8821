"""Inspection of a cache's files, rows and numbers.

stored_rows.py       StoredRows: rows by number, and their decoded taps
segment_facts.py     statistics and times of a segment, from small files
row_facts.py         figures of one row by slot and token
sample_checks.py     checks of rows by themselves, without a teacher
inspect.py           distillcache inspect
inspect_print.py     its output
inspect_warnings.py  its warnings
verify.py            distillcache verify
show.py              distillcache show
show_image.py        a row as a picture
stats.py             distillcache stats
export_samples.py    distillcache export-samples
"""
