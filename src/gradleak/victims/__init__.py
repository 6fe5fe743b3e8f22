"""Those who train on private data and share something: each returns what it released and what it kept to itself."""
