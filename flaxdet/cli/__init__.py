"""The command line ``flaxdet``, one file per command."""
