"""From 16 bits to NF4, and back."""
