"""Activations of a language model at its hook points, and their spectra."""
