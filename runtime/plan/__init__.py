"""Where every slice lives, decided from facts alone."""
