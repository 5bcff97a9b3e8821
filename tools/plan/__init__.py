"""Cost of a build before anything is written.

command.py       distillcache plan
sizes.py         sizes of a planned cache
printing.py      output of `distillcache plan`
scale.py         plan --simulate: bytes, requests, time, money
fleet.py         discrete-event simulation of many builders
students.py      training hours from a cache and with the teacher in the loop
scale_report.py  tables of the simulation
"""
