"""Uses of detections: pictures, and the formats of other libraries."""
