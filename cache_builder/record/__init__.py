"""Recording: rows through the teacher, shards into the store.

plan.py         what will be built, and whether a build resumes
identity.py     which settings identify a build; differences of two
inputs.py       the teacher's config, tokenizer and rows
work_units.py   a segment's work units: which are still to do, and their leases
presence.py     presence of a finished cache's rows files and objects
replica.py      devices of one replica of the teacher
pipeline.py     full shards on their way to the store
objects.py      bytes of a stored object
writer.py       writes objects, then the receipt
loop.py         the loop: teacher, codes, shards
fixed_files.py  files of a segment that do not depend on its rows
lockstep.py     builds by processes that share one teacher
finish.py       receipts to index, statistics and manifest
"""
