"""Ship a detector: export, check, measure and serve it. Needs no torch except in `deploy.graph.export`."""
