"""One file per op: its functional form and its registration with torch."""
