"""What runs on a bare machine with a GPU: `make gpu-check`. Needs torch alone."""
