"""Configuration files: recipes of trainings, studies and searches, and objective files."""
