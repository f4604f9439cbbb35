"""What is done with detections: pictures, and rows of other libraries."""
