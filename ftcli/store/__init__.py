"""What lies on disk: references to files, GGUF headers, run folders, atomic writes."""
