"""The archive: events of long ago in Parquet files, proven as they were in the database.

A location is a folder, or an address as fsspec takes it (``s3://bucket/audit``). Below it each table has a folder of
Hive partitions, with hidden ones for what the files are and what proves them::

    audit_logs/year=2024/month=03/RUN-0001.parquet   the rows, by (occurred_at, id), compressed with zstd
    audit_logs/_manifests/RUN.json                    what the run wrote: without it a file does not count
    audit_logs/_proofs/RUN.zip                        checkpoint and tiles, in the paths of C2SP tlog-tiles

A run is what one transaction saw of one month. Nothing is changed once it is written, so that a location may be
write-once. Needs the extra ``archive``.
"""
