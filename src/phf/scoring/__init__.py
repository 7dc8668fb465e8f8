"""Score a corpus, add further scores, inspect them, run on a cluster, publish the result."""
