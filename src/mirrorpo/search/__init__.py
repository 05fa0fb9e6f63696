"""Search for the mirror map that trains best: an evolution strategy over 380 parameters (GBMPO, arXiv 2602.04380)."""
