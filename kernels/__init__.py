"""One file an op: its contract, its torch path, its native path."""
