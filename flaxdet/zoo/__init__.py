"""The detectors, one file per builder, and the published weights."""
