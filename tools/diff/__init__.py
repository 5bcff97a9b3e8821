"""Differences of two caches or two runs.

command.py  distillcache diff
caches.py   two caches
runs.py     two runs
flat.py     nested settings as dotted names
"""
