"""What a reconstruction means."""
