"""What a pack's text is worth: perplexity, and how far it is from a reference's."""
