"""What a quota says: plain values, checked once."""
