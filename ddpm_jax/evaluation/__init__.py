"""Feature networks, metrics of sample quality, and the evaluator."""
