"""Configs, one run each; every file opens with its command and what to expect."""
