"""How a function that is installed gets other code, and its own back: knows neither tensors nor models."""
