"""What trainer and engine say to each other, and how it travels: typed messages over sockets, with deadlines."""
