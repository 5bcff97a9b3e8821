"""What is on disk and in configs; imports none of the other folders.

config.py     the configs of every command          settings.py   dotted flags, help; yaml_text.py
errors.py     what a user gets wrong                 canonical.py  JSON with one byte form and a digest
storage.py    paths and buckets                      digest.py     xxh3-128
buckets.py    what is peculiar to gs:// and s3://    claim.py      who is at work on something, until when
rows.py       packed rows and their files            layout.py     names and sizes inside a cache
manifest.py   plan, receipt, manifest                index.py      the record of a shard in index.bin
agreement.py  what these numbers must be to each other
segment.py    reading one segment, checked           codecs/       what the bytes of a tap mean
addressing.py rows and slots of several segments     tap_codec.py  from a plan's tap to its codec
progress.py   how far a long piece of work is        checkpoint_files.py  of a run: arrays in pieces
child_python.py  processes that we start
times.py      how long shards took               cache_words.py  a cache in words, for repr and notebooks
"""
