"""From an adapter to the gradient behind it."""
