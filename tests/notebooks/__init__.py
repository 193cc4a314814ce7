"""What keeps the committed notebooks true: how they are executed, compared and judged."""
