"""`python -m rollout.cli`, the same as the console command."""

from . import main

main()
