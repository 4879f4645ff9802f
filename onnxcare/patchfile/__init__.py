"""Patches as files: what turns one model file into another, byte for byte, and back."""
