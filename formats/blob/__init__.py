"""One file of tensors: its header, its layout, NF4 in it."""
