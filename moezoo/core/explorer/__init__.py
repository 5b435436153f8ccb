"""The explorer: routing traces as one self-contained HTML page."""
