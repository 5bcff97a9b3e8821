"""Object stores on loopback for the tests: real servers, started when first needed.

    python -m tests.servers gcs                    # serves until it is interrupted, prints what to export
    python -m tests.servers s3 --faults 0.1        # a tenth of all requests goes wrong

A *server* is one process (`__main__`): fake-gcs-server or moto behind a proxy on a free port. The proxy enforces what
the upstream does not (`preconditions`), spoils requests as it is told to (`faults`), and counts (`requests`). Tests
get it as the fixtures `gcs` and `s3` (`fixtures`), each time with a bucket of its own.
"""
