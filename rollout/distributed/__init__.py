"""Groups of ranks that hold one model together, without `torch.distributed`'s default group."""
