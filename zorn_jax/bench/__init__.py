"""What a step costs, beside what others would take for it."""
