"""Benches: one setup function per op, all measured by the same harness."""
