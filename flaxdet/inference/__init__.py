"""Inference: from images to detections."""
