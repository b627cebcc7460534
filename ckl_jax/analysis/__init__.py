"""What a model does at critical tokens, intervals, and pictures. Training imports nothing of it but ``statistics``."""
