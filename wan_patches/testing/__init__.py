"""Small models of every family, with random weights."""
