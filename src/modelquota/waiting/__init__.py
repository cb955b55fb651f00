"""How a request sleeps while it waits: threads, tasks, and what is built on them."""
