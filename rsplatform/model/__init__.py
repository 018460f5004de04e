"""The model's room: pixels and words in, unit vectors and captions out. Knows torch, not Ray, MLflow or DeepSpeed."""
