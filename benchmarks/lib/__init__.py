"""What the suites share: timing, load on a server, results, their age, tables and pictures."""
