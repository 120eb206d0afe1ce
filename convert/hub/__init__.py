"""A checkpoint on the Hub."""
