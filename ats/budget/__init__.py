"""K for a budget."""
