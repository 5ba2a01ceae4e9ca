"""For people at a terminal: a prompt that makes pictures, pictures on the screen, and completion for shells."""
