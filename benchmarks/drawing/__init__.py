"""Pictures of saved results."""
