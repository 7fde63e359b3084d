"""Evaluation of trained SAEs and of their features."""
