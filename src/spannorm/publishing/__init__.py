"""From a trained model to a folder that others load without this package."""
