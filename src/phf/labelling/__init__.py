"""Labels for scorers: a sample of a corpus, labelled by judges or by a person along a rubric."""
