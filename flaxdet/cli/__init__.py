"""The command line: ``flaxdet detect | convert | verify``, one file a command."""
