"""Backends that are wrong in one way each, and the right one: the suite must tell them apart."""
