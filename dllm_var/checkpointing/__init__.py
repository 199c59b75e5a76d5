"""Checkpoints on disk: written whole or not at all, checked before they are read, read without running any code."""
