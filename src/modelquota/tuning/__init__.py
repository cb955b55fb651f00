"""Tuning limits: traces of past requests, and their replay against quotas."""
