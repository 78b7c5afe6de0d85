"""One forward pass: from a scheduled batch to hidden states and logits."""
