"""The memory mode sharded: each process holds some rows of every tensor."""
