"""Code that depends on the machine that a program is compiled for."""
