"""The parameter server: layout (pytree <-> shards), messages, shard; no I/O."""
