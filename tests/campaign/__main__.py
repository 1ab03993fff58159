"""`python -m tests.campaign`."""

from .reliability import main

main()
