"""Quality of students that are trained in different ways from one teacher.

codecs.py    students from caches of different codecs
kl.py        students from three losses on tokens
routing.py   balancing of experts with and without a loss
recipes.py   recipes for a job, by tokens and by time, against the teacher in the loop
compared.py  figures of compared recipes: quality, costs, goals
jobs.py      jobs, and the ways to do them
curves.py    figures over several seeds, and their curves
room.py      disk space that they need
"""
