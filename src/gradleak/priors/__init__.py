"""What is known about pictures before anything is observed."""
