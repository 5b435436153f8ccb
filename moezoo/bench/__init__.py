"""`moezoo bench`: speed of both backends compared with the hardware limit and with other implementations.

Each contender runs in its own process while all others are idle. Writing: writings/bench.md.
"""
