"""Training of SAEs."""
