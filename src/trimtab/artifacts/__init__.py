"""What is done with finished adapters."""
