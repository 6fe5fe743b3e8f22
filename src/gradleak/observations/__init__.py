"""What the attacker sees."""
