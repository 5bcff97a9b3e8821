"""A cache compared with its teacher, with a diagnosis of mismatches.

command.py       distillcache fidelity
live_teacher.py  the teacher's numbers now, before any codec
rows.py          checks of a row's text, masks and positions
compare.py       stored taps against the teacher's
topk.py          stored logits against the teacher's
verdict.py       findings, most serious first
printing.py      its output
"""
