"""Training: data, feature cache, one loop for one device or many."""
