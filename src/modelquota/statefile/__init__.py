"""Tools beside a state file: its inspection, and the journal of an adjuster."""
