"""Other dictionaries, models and data than SAEs on language models and text."""
