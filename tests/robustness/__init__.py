"""Long profiles of robustness: what was tried, how often, and what survived."""
