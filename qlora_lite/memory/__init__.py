"""Where the bytes are: counted per category and module, observed by a profiler, rendered as a table."""
