"""What a model consists of, and what goes where in a pack. Reads no weight."""
