"""Loggers of other tools beside metrics.csv and TensorBoard, one file each."""
