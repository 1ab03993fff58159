"""`python -m mistral_large_cli` is the `mistral-large` command."""

from . import main

main()
