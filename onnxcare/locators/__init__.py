"""Locators: which hidden units carry the misbehaviour."""
