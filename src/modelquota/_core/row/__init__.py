"""Arithmetic on rows whose locks are held: no clock, no lock, no Python object."""
