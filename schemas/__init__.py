"""Definitions that every stage shares: configuration, file formats, byte stores. Imports none of the other packages.

errors.py        errors that a user can act on; each ends a command with one message and an exit code
counted.py       numbers of things in words
base.py          the strict, frozen models that configs and stored files derive from
config/          settings of every command
command_line.py  configs from YAML files and dotted flags, and their help text
format/          files of a cache, a row folder and a checkpoint: names, models, digests
manifest.py      short path to the models of a plan, a receipt and a manifest
codecs/          stored bytes of activations: encoders and decoders in pure JAX
store/           reading and writing bytes on disks and in buckets
cache/           a cache as an object: segments, addressing, leases
runtime/         processes: peers, supervisor, signals, progress
"""
