"""Memory of GPUs below torch: the driver's calls that torch has no words for, and tensors over raw addresses."""
