"""Codes chosen by what they do to a layer's outputs: weighed scales, errors put right (GPTQ)."""
