"""What the attacker sees: a model, what was done before something was shared, and the tensors that were."""
