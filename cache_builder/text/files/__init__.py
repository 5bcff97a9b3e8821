"""Input files.

inputs.py         lists files and opens them as streams
buckets.py        files in buckets: listed, measured, read ahead
marks.py          recognises formats by their first bytes
plain.py          .txt and .jsonl, also compressed
parquet.py        Parquet tables
array_records.py  ArrayRecord files
tf_example.py     the tf.train.Example wire format without TensorFlow
"""
