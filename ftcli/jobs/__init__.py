"""What needs several rooms: a run's summary, a conversation with a model, the environment."""
