"""Recommender examples that train and compare the library on public data."""
