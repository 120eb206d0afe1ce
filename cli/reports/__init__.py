"""What `layerpack inspect` says."""
