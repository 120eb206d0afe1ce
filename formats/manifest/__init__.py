"""The index manifest, layerpack.json."""
