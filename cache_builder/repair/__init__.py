"""Damage: detection, reports and repair.

survey.py         lists a cache: manifest, plans, foreign objects
finding.py        Finding: a damaged object and the rows that it affects
check.py          compares every object with what was committed
check_shard.py    compares one shard's object with its digests
restore.py        restores a damaged segment from recomputed numbers
from_teacher.py   build --repair: recomputes with the teacher
from_source.py    copy --repair: recomputes from the copy's source
lost_manifest.py  rebuilds a lost manifest
"""
