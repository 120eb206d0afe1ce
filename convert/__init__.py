"""Checkpoint in, pack out."""
