"""Shared parts of the suites: timing, load on a server, results, their age, tables and pictures."""
