"""Routing traces: which experts each token went to, as a file that is recorded, replayed, compared and exchanged."""
