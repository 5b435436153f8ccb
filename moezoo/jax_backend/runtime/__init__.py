"""The machine that a program runs on: platform, processes, compile cache, active placement."""
