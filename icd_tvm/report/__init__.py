"""One HTML file that tells a run: it needs no network, no server and no other file."""
