"""Proofs of the invariances, and what to show when one fails."""
