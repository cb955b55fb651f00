"""Runnable examples: generated traffic, and a server for real clients."""
