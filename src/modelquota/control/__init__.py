"""What changes limits by itself: load, quota files that are edited, and caches."""
