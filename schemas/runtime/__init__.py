"""Processes: how they are started, find each other, stop, and report.

peers.py         lockstep processes: rendezvous, agreement to stop, heartbeat timeout
supervise.py     the supervisor of one process: reports why it ended
signals.py       SIGTERM and SIGINT as a flag that loops poll
console.py       the log of a command line on standard error
standard_streams.py  standard output and error that are closed, full or without a reader
progress.py      progress line: done, rate, time left
memory.py        peak anonymous memory of a process
library_log.py   lines that libraries write to standard error by themselves
child_python.py  Python subprocesses that import nothing from the working directory
"""
