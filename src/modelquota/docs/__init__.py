"""The topics of the documentation, as Markdown; `modelquota docs` shows them.

The first line of a topic is ``# Title: what it is about``.
"""
