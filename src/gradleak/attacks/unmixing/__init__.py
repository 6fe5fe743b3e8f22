"""Every picture that an adapter was trained on, out of the span of its first layer."""
