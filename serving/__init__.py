"""OpenAI's way to ask and to be answered: over HTTP, and in files."""
