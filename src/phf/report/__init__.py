"""The pages: a comparison of runs, and the scores of a corpus."""
