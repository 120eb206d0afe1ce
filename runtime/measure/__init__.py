"""How fast this machine's links are."""
