"""From a prompt to tokens, pass by pass."""
