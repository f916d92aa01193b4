"""A transformers model as one GGUF file, the way llama.cpp's own converter writes it."""
