"""The detectors, one file a builder, and their published weights."""
