"""Score a model on questions: tasks of one's own, published benchmarks, a reference beside it."""
