"""Readers of corpora, segmenters, and the scored corpus on disk."""
