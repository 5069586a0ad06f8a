"""Decoders, their weights and where they come from."""
