"""Extension classes with the public verbs."""
