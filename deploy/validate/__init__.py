"""Prove an exported file: mAP on labelled images, against a reference, with a gate."""

from deploy.validate.accuracy import ArtifactResult, results_table, validate, write_results

__all__ = ["ArtifactResult", "results_table", "validate", "write_results"]
