"""Which tokens are computed next: requests, batches, and the scheduler that makes the second from the first."""
