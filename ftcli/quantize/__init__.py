"""Weights in fewer bits for vLLM and transformers, and the proof of what that cost."""
