"""phf's data for other training engines: the edited token stream in their formats.

Read `export` (what is written, a shard at a time) and `formats` (how each engine wants it).
"""
