"""What is wrong with a run: health checks while it trains, and afterwards on its logs."""
