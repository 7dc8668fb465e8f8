"""Score a corpus (`score`), on a cluster too (`cluster`), look at the scores (`inspect`) and publish them (`publish`).

`judge` runs a scorer on documents. Scoring a corpus and judging samples both go through it.
"""
