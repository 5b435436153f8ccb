"""Routing as other programs write it: one file per format, and the conversion from and to routing traces."""
