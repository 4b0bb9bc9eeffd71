"""Side-by-side measurements; each prints JSON."""
