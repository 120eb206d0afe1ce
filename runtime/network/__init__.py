"""transformers' model, and our weights in it."""
