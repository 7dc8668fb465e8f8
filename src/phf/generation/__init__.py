"""Texts from a model: how (`scenario`), from a loaded model (`loaded`, `sample`) or from a server (`server`).

`decoding` draws tokens; `fast_copy` makes a model that samples faster.
"""
