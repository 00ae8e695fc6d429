"""Runtimes carry out what actors ask for: emulated, on threads; clocks live here."""
