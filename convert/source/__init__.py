"""A checkpoint on this machine, and what any checkpoint is to the converter."""
