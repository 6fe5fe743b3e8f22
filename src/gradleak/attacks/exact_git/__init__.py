"""GIT in its exact form."""
