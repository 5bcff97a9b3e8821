"""One HTML file about a cache or a run.

command.py      distillcache report
cache.py        sections about a cache
rows.py         figures of some rows
leases.py       who works on a segment now
run.py          sections about a run
evaluations.py  sections about held-out rows
curves.py       metrics as bounded curves
experts.py      the section about experts
"""
