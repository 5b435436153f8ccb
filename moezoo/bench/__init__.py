"""`moezoo bench`: how fast both backends are, beside what the machine allows and beside other implementations.

Each contender works in a process of its own, while all others sleep. Writing: writings/bench.md.
"""
