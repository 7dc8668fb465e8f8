"""Tokenizers, the token store, and the rows that models read."""
