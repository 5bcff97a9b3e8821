"""A cache or a run in the browser.

command.py  distillcache serve
app.py      routes and error pages
guard.py    allowed hosts and response headers
asked.py    checked query parameters
watch.py    a cache that is reopened when it changes
page.py     the frame of all pages
cache.py    overview and list of rows
row.py      one row
token.py    one token
slot.py     one slot of a tap
search.py   search for text or token ids
live.py     a build in progress
run.py      a run
"""
