"""What happens to data: fetch, features, training, backtest, prediction, report."""
