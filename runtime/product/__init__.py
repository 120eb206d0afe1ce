"""Products whose rows have equal bits, however many there are."""
