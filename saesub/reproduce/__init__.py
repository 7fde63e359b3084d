"""Running the notebooks, and comparison with the paper."""
