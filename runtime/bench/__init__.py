"""Ways of streaming a pack, timed side by side."""
