"""Detectors of the library transformers as our own: real-time DETRs with their published losses."""
