"""Models and corpora by name."""
