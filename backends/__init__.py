"""Attention backends: the contract, the matrix, the built-in ones."""
