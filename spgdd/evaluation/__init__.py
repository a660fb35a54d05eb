"""How good the diagnoses are: the k-shot protocol, its metrics and tables."""
