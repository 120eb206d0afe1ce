"""What a text says about the inputs of each linear layer, for the choice of codes."""
