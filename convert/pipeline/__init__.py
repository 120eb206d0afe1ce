"""Blobs out of tensors, by threads."""
