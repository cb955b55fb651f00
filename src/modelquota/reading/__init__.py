"""What can be read, of a manager or of a state file."""
