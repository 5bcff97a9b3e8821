"""The whole job on a real teacher.

command.py  distillcache demo
teacher.py  fetches the teacher
report.py   its report
"""
