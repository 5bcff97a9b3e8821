"""A cache as an object.

segment.py     one segment: plan, arrays, index, rows, and checked reads of its small files
lost_plan.py   what to do about a lost plan
agreement.py   checks that a cache's small files agree with each other
unfinished.py  what to do about a cache that is not finished
addressing.py  row and slot numbers across segments
describe.py    the text that repr() of a cache gives
lease_file.py  the format of a lease (the files are called claims on disk)
lease.py       leases on work units: conditional creation, heartbeat, expiry
waiting.py     messages about whose lease a process waits for
"""
