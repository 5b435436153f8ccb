"""`python -m moezoo`."""

from moezoo.cli import main

main()
