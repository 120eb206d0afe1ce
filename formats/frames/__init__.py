"""Compressed blobs: frames of zstd."""
