"""Waiting for admission in threads and asyncio tasks, and the decorator and stream helper built on it."""
