"""Models as GGUF files, without llama.cpp: weights in its types, bit for bit as it would write them."""
