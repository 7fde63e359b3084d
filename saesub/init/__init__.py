"""Initialisations of SAEs."""
