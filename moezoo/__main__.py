"""`python -m moezoo`."""

from moezoo.cli.main import main

main()
