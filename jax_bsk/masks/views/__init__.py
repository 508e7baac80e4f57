"""Views of finished block lists on the host: checks, dense arrays, descriptions and pictures."""
