"""Process groups of our own: where members meet, how they talk, and deadlines that hold whatever a member does.

A group is a `TCPStore` at which its members meet (`rendezvous`) and one communicator in each of them, made with the
constructor of gloo or NCCL itself (`backends`). `torch.distributed`'s world is neither read nor changed, so a group
works with and without a default group, beside other groups, and any number of times under one name.
"""
