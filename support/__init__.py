"""What is needed to operate and not to understand: runs, checkpoints, processes, text, plans."""
