"""Helpers of the parity tests."""
