"""Work on and beside a state file: inspecting and verifying it, and the journal of a load adjuster."""
