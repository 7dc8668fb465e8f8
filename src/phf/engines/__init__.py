"""phf for other training engines: the edited token stream in their formats, and adapters of two trainers.

Read `export` (what is written, a shard at a time) and `formats` (how each engine wants it); then `rows` (what the
adapters share), `olmo` and `torchtitan`.
"""
