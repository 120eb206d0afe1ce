"""Where a pack is built, and what of it is done."""
