"""An adapter and its base become one model: exact, in bounded memory, and held against what it came from."""
