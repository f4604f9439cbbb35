"""The convolution, and one file for each route that computes it quickly; ``dispatch.py`` chooses the route."""
