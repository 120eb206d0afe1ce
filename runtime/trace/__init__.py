"""When each stage did what, and what that says."""
