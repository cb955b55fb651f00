"""The least that a call can cost: extension methods that do all but decide."""
