"""From a pack to tokens: where weights live, and how they arrive in time."""
