"""Measures of routing traces: load, specialization, co-activation, saturation, expert caches. Writing: measures.md."""
