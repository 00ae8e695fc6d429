"""Experiments: the library at work on real data; the only room that reads flags."""
