"""What a build costs: seconds and memory (`speed`), and the loss of quality against the checkpoint (`quality`)."""
