"""ftcli: one recipe from raw conversations to a fine-tuned model."""

__version__ = "0.1.0"
