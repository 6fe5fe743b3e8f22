"""From an adapter to the gradient behind it: decoders that are fitted on public pictures."""
