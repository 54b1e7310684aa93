"""What tells about a model: what it is, whether it was converted right, how fast it is here."""
