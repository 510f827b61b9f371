"""Attack a model, row by row, and check that the attacks were worth it."""
