"""Commands that only call a stage.

prepare.py  distillcache prepare
copy.py     distillcache copy
export.py   distillcache export
"""
