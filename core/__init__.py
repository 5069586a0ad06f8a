"""The engine: configuration, scheduling, running a step, the embedding API."""
