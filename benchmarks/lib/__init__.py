"""What the suites share: timing, load on a server, records, pictures."""
