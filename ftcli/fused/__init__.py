"""The fast path: the layers of known families with their backward pass by hand, and a loss that keeps no logits."""
