"""Examples that can be run: made-up traffic, and a server that speaks to real clients."""
