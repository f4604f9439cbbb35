"""From an image file to a batch, and from detections in a batch back to the image."""
