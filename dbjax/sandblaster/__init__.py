"""Sandblaster: batch methods whose vectors live on shards and whose batch is portions.

The coordinator sees scalars only. `portions` hands the batch out, `vectors` gives
commands to the shards, `schedule` says how long a batch takes on an emulated cluster.
"""
