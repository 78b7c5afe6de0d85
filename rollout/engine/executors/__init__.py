"""Where the engine loop runs: this process, child processes, Ray actors."""
