"""Automatic updates of a manager: limits that follow the load or a quota file, and memory use from caches."""
