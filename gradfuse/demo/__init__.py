"""The demo: nets on scanned digits, with PyTorch's parts and with gradfuse's."""
