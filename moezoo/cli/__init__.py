"""The command line: `moezoo --help`."""
