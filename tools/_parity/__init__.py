"""The engine of check_parity.py: cases of the official code, run on our models."""
