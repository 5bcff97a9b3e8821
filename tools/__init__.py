"""The command line, and everything that looks at a cache or a run."""
