"""The doctor: whether a model directory is whole, what it holds, and whether it draws what it should."""
