"""What a file's bytes say: which library reads it, in which parts, and how long it should be."""
