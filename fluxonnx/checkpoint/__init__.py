"""Model directories: safetensors files, configs, names and formats of weights, and the manifest of exported builds."""
