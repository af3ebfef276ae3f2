"""A page of recommendations with the experts behind them, and its JSON endpoint."""
