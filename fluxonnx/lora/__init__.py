"""LoRA and its relatives: files of small changes to the linear layers of a model, and how graphs compute them."""
