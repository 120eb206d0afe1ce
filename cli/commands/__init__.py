"""The commands: what each takes, and what is known to be wrong before anything slow begins."""
