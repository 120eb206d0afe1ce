"""What is on disk: manifest, blobs, NF4 layout. Knows neither convert nor runtime."""
