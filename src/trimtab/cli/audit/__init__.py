"""Look for what makes a result worthless."""
