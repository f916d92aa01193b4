"""What is trained: the base model as it is loaded, what LoRA is put on, and the attention between documents."""
