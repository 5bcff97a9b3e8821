"""The command line, and everything that looks at a cache or a run.

cli.py     the program `distillcache` and its commands
commands/  prepare, copy, export
look/      inspect, verify, show, stats, export-samples
fidelity/  fidelity: a cache against the live teacher
diff/      diff: two caches or two runs
plan/      plan and its simulation
report/    report: one HTML file
viewer/    serve: the viewer in a browser
pages/     parts of pages and tables that report and viewer share
bench/     bench: speed and accuracy
demo/      demo: the whole job on a real teacher
"""
