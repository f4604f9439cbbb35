"""COCO's figures of a model on a data set."""
