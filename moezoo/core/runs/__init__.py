"""Run folders: create, open, resume, start from a checkpoint, save, convert."""
