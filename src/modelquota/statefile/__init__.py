"""Work on and beside a state file: inspecting, verifying and migrating it, and the journal of a load adjuster."""
