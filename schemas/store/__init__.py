"""Bytes on disks and in buckets, through TensorStore.

store.py          Store: read, write, list, conditional writes, garbled responses, links that lead out
buckets.py        TensorStore specs of gs:// and s3://: retries of requests, errors in words
path.py           the part of pathlib.Path's interface that readers of small files use, for buckets
locks.py          advisory file locks that end with their process
stale_locks.py    lock files of TensorStore's file driver, and which of them are in use
single_flight.py  bounded memory cache in which each object is read once
disk_errors.py    errors of file systems, and what to do about each
local_path.py     local paths that open regular files only: no pipes, no devices
names.py          refuses local paths that cannot exist or may not be entered
url_secrets.py    refuses credentials inside URLs
redaction.py      recognises and hides credentials in URLs
whole_file.py     replaces a file as a whole
"""
