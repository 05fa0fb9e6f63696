"""Which mirror map trains best? An evolution strategy over its 380 parameters (GBMPO, arXiv 2602.04380)."""
